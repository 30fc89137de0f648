"""The OpenAPI document of the service and the page at /docs that shows it.

BentoML writes one for its own endpoints only, and its page loads a tracker from the network: ours stand in front.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dlops import catalog
from dlops.serve.guard import PAGE_HEADERS
from dlops.version import __version__

if TYPE_CHECKING:
    from dlops.artifact import Artifact
    from dlops.serve.model import ServedModel

# Swagger UI as BentoML ships it, from this server: nothing is fetched from elsewhere.
_SCRIPT = 'SwaggerUIBundle({url: "./docs.json", dom_id: "#swagger-ui", validatorUrl: null});'
PAGE = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"><title>dlops service</title>
<link rel="stylesheet" href="./static_content/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="./static_content/swagger-ui-bundle.js"></script>
<script>{_SCRIPT}</script>
</body>
</html>
"""
_HASH = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
PAGE_POLICY = f"{PAGE_HEADERS['content-security-policy']}; script-src 'self' 'sha256-{_HASH}'"
_MODEL = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
_VERSION = [*_MODEL, {"name": "version", "in": "path", "required": True, "schema": {"type": "string"}}]
_TENSOR = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": {"type": "string"},
        "datatype": {"type": "string", "example": "FP32"},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "data": {"type": "array", "items": {}},
        "parameters": {"type": "object"},
    },
}
_BOX = {
    "type": "array",
    "items": {"type": "number"},
    "minItems": 4,
    "maxItems": 4,
    "description": "x1, y1, x2, y2 in pixels of the picture as it was sent.",
}
_SUMMARIES = {
    "classification": "Labels with probabilities",
    "detection": "Boxes with labels and scores",
    "segmentation": "A class for each pixel",
    "generation": "Pictures",
    "regression": "Values",
}
_SCHEMAS: dict[str, Any] = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "string"}, "field": {"type": "string", "description": "The part at fault."}},
    },
    "Numbers": {
        "type": "object",
        "required": ["inputs"],
        "properties": {"inputs": {"type": "array", "items": {}, "description": "One input, or a list of them."}},
    },
    "Texts": {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "inputs": {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
        },
    },
    "Form": {
        "type": "object",
        "properties": {"image": {"type": "string", "format": "binary"}, "file": {"type": "string", "format": "binary"}},
    },
    "Label": {
        "type": "object",
        "required": ["label", "probability"],
        "properties": {"label": {"type": "string"}, "probability": {"type": "number"}},
    },
    "Classification": {
        "type": "object",
        "required": ["label", "probability", "top"],
        "properties": {
            "label": {"type": "string"},
            "probability": {"type": "number"},
            "top": {"type": "array", "items": {"$ref": "#/components/schemas/Label"}},
        },
    },
    "Detection": {
        "type": "object",
        "required": ["detections"],
        "properties": {
            "detections": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["label", "score", "box"],
                    "properties": {"label": {"type": "string"}, "score": {"type": "number"}, "box": _BOX},
                },
            },
        },
    },
    "Segmentation": {
        "type": "object",
        "required": ["size", "classes", "mask"],
        "properties": {
            "size": {"type": "array", "items": {"type": "integer"}, "description": "Height and width of the mask."},
            "classes": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["label", "class", "share"],
                    "properties": {
                        "label": {"type": "string"},
                        "class": {"type": "integer"},
                        "share": {"type": "number", "description": "Of the pixels."},
                    },
                },
            },
            "mask": {"type": "string", "format": "byte", "description": "A PNG with one class a pixel, in base64."},
            "area": _BOX,
        },
    },
    "Generation": {
        "type": "object",
        "required": ["size", "image"],
        "properties": {
            "size": {"type": "array", "items": {"type": "integer"}, "description": "Height and width."},
            "image": {"type": "string", "format": "byte", "description": "A PNG in base64."},
        },
    },
    "Regression": {"type": "object", "required": ["values"], "properties": {"values": {}}},
    # What each requires tells them apart: an answer is one of them.
    "Prediction": {"oneOf": [{"$ref": f"#/components/schemas/{task.capitalize()}"} for task in catalog.TASKS]},
    "Predictions": {
        "type": "object",
        "required": ["model", "version", "predictions"],
        "properties": {
            "model": {"type": "string"},
            "version": {"type": "string"},
            "predictions": {"type": "array", "items": {"$ref": "#/components/schemas/Prediction"}},
        },
    },
    "InferRequest": {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "inputs": {"type": "array", "items": _TENSOR},
            "outputs": {"type": "array", "items": {"type": "object"}},
            "parameters": {"type": "object"},
        },
    },
    "InferResponse": {
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "outputs": {"type": "array", "items": _TENSOR},
        },
    },
}


def openapi_document(models: Sequence[ServedModel]) -> dict[str, Any]:
    """OpenAPI 3.0 of every route. models: what is served, for the title and the texts; none before it is loaded."""
    title = " · ".join(model.title for model in models) or "dlops"
    artifact = models[0].artifact if len(models) == 1 else None
    paths: dict[str, Any] = {
        "/predict": {"post": _predict(artifact)},
        "/models/{name}/predict": {"post": _predict(artifact, _MODEL)},
        "/models/{name}/versions/{version}/predict": {"post": _predict(artifact, _VERSION)},
        "/v2": {"get": _get("Server metadata")},
        "/v2/health/live": {"get": _get("Whether the process answers")},
        "/v2/health/ready": {"get": _get("Whether the models passed their self-tests and take requests")},
        "/v2/models/stats": {"get": _get("Counts and times of all models, over all workers")},
        "/v2/repository/index": {"post": _repository("What is there to serve, and what is served")},
        "/v2/repository/models/{name}/load": {
            "post": _repository("Serve what the repository has of this name now, on all workers", _MODEL)
        },
        "/v2/repository/models/{name}/unload": {"post": _repository("Serve nothing of this name any more", _MODEL)},
        "/metrics": {"get": _get("Prometheus metrics")},
        "/livez": {"get": _get("Whether the process answers")},
        "/readyz": {"get": _get("As /v2/health/ready")},
    }
    for base, parameters in (("/v2/models/{name}", _MODEL), ("/v2/models/{name}/versions/{version}", _VERSION)):
        paths |= {
            base: {"get": _get("Model metadata: tensors, versions", parameters)},
            f"{base}/ready": {"get": _get("Whether this model is ready", parameters)},
            f"{base}/config": {"get": _get("Model configuration, as Triton has it", parameters)},
            f"{base}/stats": {"get": _get("Counts and times of this model, over all workers", parameters)},
            f"{base}/infer": {"post": _infer(parameters)},
        }
    return {
        "openapi": "3.0.3",
        "info": {"title": title, "version": __version__, "description": _shown(models)},
        "paths": paths,
        "components": {"schemas": _SCHEMAS},
    }


def _shown(models: Sequence[ServedModel]) -> str:
    if not models:
        return "The model is still loading, or none is served."
    return " ".join(
        f"{model.title}: {model.artifact.task}, {model.artifact.slug}; tensors for /v2: "
        + ", ".join(f"{s.name}: {s.dtype} {list(s.shape)}" for s in model.signature.inputs) + "."
        for model in models
    )  # fmt: skip


def _predict(artifact: Artifact | None, parameters: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    binary = {"schema": {"type": "string", "format": "binary"}}
    kind = None if artifact is None or artifact.preprocess is None else artifact.preprocess.input
    content: dict[str, Any] = {"application/json": _body("Texts" if kind == "text" else "Numbers")}
    if kind in ("text", None):
        content["text/plain"] = {"schema": {"type": "string"}}
    # A model that takes numbers has no use for files.
    if kind in ("image", None):
        files = {"image/*": binary, "application/octet-stream": binary, "multipart/form-data": _body("Form")}
        content = files | content
    return {
        "summary": _SUMMARIES[artifact.task] if artifact else "What the model says",
        "description": "One image, several in a form, or pixels, features or texts as JSON.",
        "parameters": list(parameters),
        "requestBody": {"required": True, "content": content},
        "responses": _responses("Predictions"),
    }


def _infer(parameters: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "summary": "Inference by the Open Inference Protocol",
        "description": "JSON, or JSON and then raw tensors with Inference-Header-Content-Length.",
        "parameters": list(parameters),
        "requestBody": {"required": True, "content": {"application/json": _body("InferRequest")}},
        "responses": _responses("InferResponse"),
    }


def _get(summary: str, parameters: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"summary": summary, "parameters": parameters or [], "responses": {"200": {"description": "Yes, or it."}}}


def _repository(summary: str, parameters: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    error = {"content": {"application/json": _body("Error")}}
    return {
        "summary": summary,
        "parameters": list(parameters),
        "requestBody": {"content": {"application/json": {"schema": {"type": "object"}}}},
        "responses": {
            "200": {"description": "Done, or the list."},
            "404": {"description": "There is no such model.", **error},
            "500": {"description": "It could not be loaded; what was served before still is.", **error},
            "501": {"description": "This server's models do not change while it runs.", **error},
        },
    }


def _body(schema: str) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{schema}"}}


def _responses(schema: str) -> dict[str, Any]:
    error = {"content": {"application/json": _body("Error")}}
    return {
        "200": {"description": "The answer.", "content": {"application/json": _body(schema)}},
        "400": {"description": "The request does not fit; field says which part.", **error},
        "404": {"description": "There is no such model or version.", **error},
        "413": {"description": "The body is too large.", **error},
        "429": {"description": "The queue is full; Retry-After says when to come back.", **error},
        "503": {"description": "Not ready, or shutting down.", **error},
        "504": {"description": "The request's deadline passed, or the server's limit.", **error},
    }

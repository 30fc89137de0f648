"""The models that a worker serves at this moment, by name and version."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import quote

from dlops.errors import InputError
from dlops.serve.answers import NotReadyError, UnknownModelError
from dlops.serve.model import ServedModel
from dlops.serve.repository import newest_first


class Models:
    """Read and changed on the event loop only. `paths`: by the addresses at which each is asked, as they are sent."""

    def __init__(self) -> None:
        self._by_name: dict[str, dict[str, ServedModel]] = {}
        self.paths: Mapping[bytes, ServedModel] = {}
        self.is_loaded = False
        """Whether all that is to be served at first has been loaded and has passed its self-test, and may be asked."""

    def __iter__(self) -> Iterator[ServedModel]:
        return (model for versions in self._by_name.values() for model in versions.values())

    def replace(self, models: Sequence[ServedModel], *, first: bool = False) -> None:
        """Serve these and no others from here on; within a name the newest version is asked where none is named.

        first: at the start of a server; they may be asked once it sets `is_loaded`.
        """
        by_name: dict[str, dict[str, ServedModel]] = {}
        for model in models:
            by_name.setdefault(model.name, {})[model.version] = model
        self._by_name = {
            name: {version: versions[version] for version in newest_first(versions)}
            for name, versions in by_name.items()
        }
        paths = {}
        for name, versions in self._by_name.items():
            base = b"/v2/models/%s" % quote(name, safe="").encode()
            paths[base + b"/infer"] = next(iter(versions.values()))
            for version, model in versions.items():
                paths[base + b"/versions/%s/infer" % quote(version, safe="").encode()] = model
        self.paths = paths
        self.is_loaded = self.is_loaded or not first

    def find(self, name: str, version: str = "") -> ServedModel:
        """The model of this name and version, the newest where that is empty.

        Raises NotReadyError, UnknownModelError.
        """
        versions = self._known(name)
        if not version:
            return next(iter(versions.values()))
        if version not in versions:
            raise UnknownModelError(f"unknown version {version[:200]!r} of {name}, there is {', '.join(versions)}")
        return versions[version]

    def versions(self, name: str) -> list[ServedModel]:
        """All of that name, newest first. Raises NotReadyError, UnknownModelError."""
        return list(self._known(name).values())

    def only(self) -> ServedModel:
        """The model that is meant where none is named. Raises NotReadyError, InputError where there are several."""
        self.check_loaded()
        if len(self._by_name) != 1:
            known = ", ".join(self._by_name) or "no model at all"
            raise InputError(f"which model? this server has {known}", field="model", hint="POST /models/NAME/predict")
        return next(iter(next(iter(self._by_name.values())).values()))

    @property
    def first(self) -> ServedModel | None:
        """Of the first name, the newest; None where there is none."""
        return next(iter(self), None)

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    def _known(self, name: str) -> Mapping[str, ServedModel]:
        self.check_loaded()
        if name not in self._by_name:
            known = ", ".join(self._by_name) or "none"
            raise UnknownModelError(f"unknown model {name[:200]!r}, this server has {known}")
        return self._by_name[name]

    def check_loaded(self) -> None:
        """Raise NotReadyError before the first models are loaded."""
        if not self.is_loaded:
            raise NotReadyError("the model is not ready", hint="GET /v2/health/ready says when it is")

"""ONNX Runtime on the CPU or CUDA, with the provider that was asked for or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime as ort

from dlops.artifact import Artifact
from dlops.environment import available_cores
from dlops.errors import CorruptError, MachineError
from dlops.runtimes.session import Placement, SessionOptions, check_bound
from dlops.signature import Array, Feed, Signature

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_ERRORS_ONLY = 3


class OnnxSession:
    """One InferenceSession and the names of its outputs."""

    def __init__(
        self, model: str | bytes, *, signature: Signature, precision: str, options: SessionOptions, title: str
    ) -> None:
        threads = options.threads or available_cores()
        device = _choose_device(options)
        provider = _PROVIDERS[device]
        try:
            self._session = ort.InferenceSession(
                model, sess_options=_session_options(threads, options), providers=_chain(provider)
            )
        except Exception as error:  # ORT raises a class of its own a status code, all direct children of Exception
            raise CorruptError(f"{title}: ONNX Runtime cannot load it: {_first_line(error)}") from error
        used = self._session.get_providers()[0]
        if used != provider:
            raise MachineError(
                f"{title}: asked for {provider}, ONNX Runtime gave {used}",
                hint="dlops doctor shows which providers work here; --device cpu runs on the CPU",
            )
        self.signature = signature
        self._device = device
        self._outputs = [spec.name for spec in signature.outputs]
        # ORT's CPU kernels for fp16 cast to fp32 and back.
        computed = "fp32" if provider == "CPUExecutionProvider" and precision == "fp16" else precision
        self.placement = Placement(
            runtime="onnxruntime", device="cuda:0" if device == "cuda" else "cpu", provider=used, precision=computed,
            threads=threads,
        )  # fmt: skip

    def run(self, feed: Feed) -> Feed:
        outputs: list[Any] = self._session.run(self._outputs, dict(feed))
        return dict(zip(self._outputs, outputs, strict=True))

    def bind(self, feed: Feed) -> OnnxBound:
        """Through IO binding."""
        return OnnxBound(self._session, feed, self.run(feed), signature=self.signature, device=self._device)

    def end_profile(self) -> Path:
        """The file of every operator that ran so far, in Chrome's trace format; for a session with a profile_prefix."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        del self._session


class OnnxBound:
    """An IO binding over buffers that ONNX Runtime allocated on the session's device."""

    def __init__(
        self, session: ort.InferenceSession, feed: Feed, outputs: Feed, *, signature: Signature, device: str
    ) -> None:
        """outputs: what the session gives for the feed."""
        self._session = session
        self._binding = session.io_binding()
        self._names = [spec.name for spec in signature.outputs]
        self._like = {spec.name: feed[spec.name] for spec in signature.inputs}
        self._inputs = {name: _buffer(array, device) for name, array in self._like.items()}
        for name, buffer in self._inputs.items():
            self._binding.bind_ortvalue_input(name, buffer)
        self._device = device
        self._unsized: list[str] = []
        given = {dim for spec in signature.inputs for dim in spec.shape}
        for spec in signature.outputs:
            if any(isinstance(dim, str) and dim not in given for dim in spec.shape):
                self._unsized.append(spec.name)
                self._binding.bind_output(spec.name, device, 0)
            else:
                self._binding.bind_ortvalue_output(spec.name, _buffer(outputs[spec.name], device))
        self.copy_in(feed)

    def copy_in(self, feed: Feed) -> None:
        check_bound(self._like, feed)
        for name, buffer in self._inputs.items():
            buffer.update_inplace(feed[name])
        # A copy from pageable memory may go on after the call on the default stream, which the model does not use.
        self._binding.synchronize_inputs()

    def run(self) -> None:
        for name in self._unsized:
            # Its size may depend on the data, and what a run allocated is the buffer of the next unless bound anew.
            self._binding.bind_output(name, self._device, 0)
        self._session.run_with_iobinding(self._binding)

    def synchronize(self) -> None:
        self._binding.synchronize_outputs()

    def copy_out(self) -> Feed:
        return dict(zip(self._names, self._binding.copy_outputs_to_cpu(), strict=True))


def open_session(artifact: Artifact, options: SessionOptions) -> OnnxSession:
    return OnnxSession(
        str(artifact.path("model")), signature=artifact.signature, precision=artifact.variant.precision,
        options=options, title=artifact.title,
    )  # fmt: skip


def cuda_works() -> bool:
    """Whether this build of ONNX Runtime has CUDA and there is a device for it."""
    from dlops.environment import describe_environment

    if "CUDAExecutionProvider" not in ort.get_available_providers() or not describe_environment().gpus:
        return False
    # Loads the CUDA libraries that pip installed beside it, without torch.
    ort.preload_dlls()
    return True


def _choose_device(options: SessionOptions) -> str:
    if options.device == "auto":
        return "cuda" if cuda_works() else "cpu"
    if options.device == "cuda" and not cuda_works():
        raise MachineError(
            "CUDA was asked for, and there is no GPU with ONNX Runtime's CUDA build here",
            hint="dlops doctor shows what works; --device cpu runs on the CPU",
        )
    return options.device


def _session_options(threads: int, options: SessionOptions) -> ort.SessionOptions:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = _ERRORS_ONLY
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if options.spin else "0")
    if options.profile_prefix is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(options.profile_prefix)
    return settings


def _chain(provider: str) -> list[str]:
    # The CPU provider stays behind CUDA for shape operators; the session's first provider is checked above.
    return [provider] if provider == "CPUExecutionProvider" else [provider, "CPUExecutionProvider"]


def _buffer(array: Array, device: str) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_shape_and_type(list(array.shape), array.dtype.type, device, 0)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__

"""The Open Inference Protocol's messages over gRPC, for those who serve it and those who measure it.

They are tritonclient's, which are generated from the protocol's own definition. Importing this module raises
MachineError where a package is missing.
"""

from __future__ import annotations

from collections.abc import Mapping

from dlops.errors import missing_package

try:
    import grpc
    import grpc.aio
    from google.protobuf import json_format, message_factory
    from google.protobuf.message import DecodeError
    from tritonclient.grpc import service_pb2, service_pb2_grpc
except ModuleNotFoundError as error:
    packages = {"tritonclient": "tritonclient", "grpc": "grpcio", "google": "protobuf"}
    lacking = (error.name or "").partition(".")[0]
    if lacking not in packages:
        raise
    raise missing_package(packages[lacking], extra="triton", needed_for="gRPC") from None

__all__ = ["CONTENTS", "DecodeError", "grpc", "json_format", "message_factory", "service_pb2", "service_pb2_grpc"]

# Where a tensor's numbers are that do not come raw, by datatype; float16 always comes raw.
CONTENTS: Mapping[str, str] = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents",
}  # fmt: skip

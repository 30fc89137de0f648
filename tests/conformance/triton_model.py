"""tritonserver's python backend: an ONNX file through ONNX Runtime, whatever its inputs and outputs are."""

import json

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.inputs = [one["name"] for one in config["input"]]
        self.outputs = [one["name"] for one in config["output"]]
        path = config["parameters"]["onnx"]["string_value"]
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        responses = []
        for request in requests:
            feed = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            found = self.session.run(self.outputs, {name: np.ascontiguousarray(array) for name, array in feed.items()})
            tensors = [pb_utils.Tensor(name, array) for name, array in zip(self.outputs, found, strict=True)]
            responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
        return responses

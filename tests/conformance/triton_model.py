"""tritonserver's python backend: an ONNX file through ONNX Runtime, whatever its inputs and outputs are.

Any other file stands for a model that gives back its one input, which is handed on as it lies there: numpy has no
bfloat16.
"""

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
        path = config["parameters"]["model"]["string_value"]
        self.session = None
        if path.endswith(".onnx"):
            self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        responses = []
        for request in requests:
            if self.session is None:
                given = pb_utils.get_input_tensor_by_name(request, self.inputs[0]).to_dlpack()
                tensors = [pb_utils.Tensor.from_dlpack(self.outputs[0], given)]
                responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
                continue
            feed = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            found = self.session.run(self.outputs, {name: np.ascontiguousarray(array) for name, array in feed.items()})
            tensors = [pb_utils.Tensor(name, array) for name, array in zip(self.outputs, found, strict=True)]
            responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
        return responses

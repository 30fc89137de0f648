"""tritonserver's python backend: batches that Triton's dynamic batcher made, through ONNX Runtime."""

import json

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        path = json.loads(args["model_config"])["parameters"]["onnx"]["string_value"]
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        rows = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        (logits,) = self.session.run(["logits"], {"x": np.concatenate(rows)})
        ends = np.cumsum([len(some) for some in rows])[:-1]
        return [
            pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("logits", own)])
            for own in np.split(logits, ends)
        ]

"""BentoML as its documentation begins: arrays in JSON, its own batching, defaults for everything else."""

import os

import bentoml
import numpy as np
import onnxruntime as ort


@bentoml.service
class Mlp:
    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])

    @bentoml.api(batchable=True)
    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.session.run(["logits"], {"x": x.astype(np.float32)})[0]

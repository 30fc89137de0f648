"""LitServe: JSON, batches of what comes within 1 ms: with no wait at all, its default, it is slower here."""

import os
import sys

import litserve
import numpy as np
import onnxruntime as ort


class Mlp(litserve.LitAPI):
    def setup(self, device):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])

    def decode_request(self, request):
        return np.array(request["x"], np.float32)

    def predict(self, x):
        return self.session.run(["logits"], {"x": x})[0]

    def encode_response(self, output):
        return {"logits": output.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Mlp(max_batch_size=64, batch_timeout=0.001), accelerator="cpu")
    # A line a request in the log would cost it time.
    server.run(host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", generate_client_file=False)

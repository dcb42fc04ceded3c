import gzip
from dataclasses import dataclass
import numpy as np
import pyarrow as pa

SOURCES = {"fashion-mnist": "pipeline.sources:FM"}

@dataclass(frozen=True)
class Example:
    image: np.ndarray
    conditions: dict

class FM:
    class_names = tuple("abcdefghij")
    def __init__(self, options, images): self.o = options
    def list_images(self, split):
        n = self.o.num_images or 60000
        return pa.table({"image_id": np.arange(n), "uri": [f"fm://{i}" for i in range(n)], "label": np.zeros(n, np.int32)})
    def fetch(self, uri):
        if not hasattr(self, "d"):
            raw = gzip.open("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz").read()
            self.d = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 784)
        return self.d[int(uri[5:])].tobytes()
    def decode(self, data): return Example(np.frombuffer(data, np.uint8).reshape(28, 28, 1), {})

def open_source(options, images): return FM(options, images)

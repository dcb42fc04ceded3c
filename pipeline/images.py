"""Image operations before the tokenizer (placeholder until the sources part lands)."""
import numpy as np
from PIL import Image

from stages.options import ImageOptions


def apply_view(image: np.ndarray, view: str, options: ImageOptions) -> np.ndarray:
    pil = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("L" if options.channels == 1 else "RGB")
    scale = options.size / min(pil.size)
    if scale != 1:
        pil = pil.resize((round(pil.width * scale), round(pil.height * scale)), Image.Resampling.BICUBIC)
    x, y = (pil.width - options.size) // 2, (pil.height - options.size) // 2
    out = np.asarray(pil.crop((x, y, x + options.size, y + options.size))).reshape(options.size, options.size, options.channels)
    return np.ascontiguousarray(out[:, ::-1] if view == "flip" else out)


def preprocessing_spec(options: ImageOptions) -> dict:
    return {"version": 1, "size": options.size, "channels": options.channels, "crop": options.crop}

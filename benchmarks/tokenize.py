"""The tokenize job on Ray beside a bare loop of the same encoder over pixels in memory, and what makes that encoder fast.

python benchmarks/tokenize.py [--num-images 12000] [--size 64] [--repeats 3]

One encoder of one thread; the rest of the machine decodes JPEG files. The bare loop is the same function in a process of its own,
measured before and after the job.
"""

import sys

if not __package__:  # run as a file: this folder would hide Python's own module `tokenize`
    sys.path[0] = sys.path[0].rpartition("/")[0]

import argparse
import io
import json
import os
import statistics
import subprocess
import tempfile
import time

import numpy as np
import torch
from PIL import Image

from cluster.runtime import connected
from pipeline import storage
from pipeline.encoding import encode_views, prepare_tokenizer
from pipeline.images import decode_image
from pipeline.sources.scenes import render
from pipeline.tokenize_images import TokenizeOptions, tokenize
from pipeline.tokenizers import open_tokenizer, store_tokenizer
from pipeline.views import apply_view
from stages.first_stage.pixels import to_float
from stages.first_stage.tokenizer import Tokenizer
from stages.first_stage.tokenizer_config import TokenizerConfig
from stages.memory import keep_freed_memory
from stages.options import CodesOptions, ImageOptions, SourceOptions, TokenizerOptions

CODES = CodesOptions(encode_batch_size=32, shard_size=256)
NUM_BARE_IMAGES, NUM_DISTINCT = 512, 500
MODES = ("as shipped", "contiguous", "default malloc", "contiguous, default malloc")


def tokenizer_config(size: int) -> TokenizerConfig:
    """An f8 VQGAN of 64 channels."""
    return TokenizerConfig(
        resolution=size,
        in_channels=3,
        codebook_size=1024,
        codebook_dim=8,
        base_channels=64,
        channel_multipliers=(1, 1, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(size // 8,),
        z_channels=128,
        quantizer="vq",
    )


def write_images(folder: str, num_images: int, size: int) -> None:
    """JPEG files somewhat larger than the crop, as they would be found."""
    os.makedirs(folder)
    contents = []
    for index in range(NUM_DISTINCT):
        buffer = io.BytesIO()
        image = Image.fromarray(render(0, "train", index, size).image).resize((2 * size, size * 3 // 2))
        image.save(buffer, "JPEG", quality=90)
        contents.append(buffer.getvalue())
    for index in range(num_images):
        with open(os.path.join(folder, f"{index:06d}.jpg"), "wb") as file:
            file.write(contents[index % NUM_DISTINCT])


def bare_loop(tokenizer_path: str, folder: str, images: ImageOptions, mode: str, repeats: int) -> dict[str, object]:
    """Images per second of the encoder alone over pixels in memory, on one thread, and the codes."""
    torch.set_num_threads(1)
    if "default malloc" not in mode:
        keep_freed_memory()
    names = [os.path.join(folder, f"{index:06d}.jpg") for index in range(NUM_BARE_IMAGES)]
    views = np.stack([apply_view(decode_image(storage.read_bytes(name)), "center", images) for name in names])
    tokenizer = open_tokenizer(tokenizer_path)
    if "contiguous" in mode:
        codes, rate = _rate(lambda: _encode_contiguous(tokenizer, views), repeats)
    else:
        tokenizer = prepare_tokenizer(tokenizer, torch.device("cpu"))
        codes, rate = _rate(lambda: encode_views(tokenizer, views, CODES), repeats)
    return {"images_per_second": rate, "codes": codes.tolist()}


@torch.inference_mode()
def _encode_contiguous(tokenizer: Tokenizer, views: np.ndarray) -> np.ndarray:
    batches = torch.from_numpy(views).split(CODES.encode_batch_size)
    return torch.cat([tokenizer.encode(to_float(batch).contiguous()) for batch in batches]).numpy()


def _rate(run, repeats: int) -> tuple[np.ndarray, float]:
    codes, times = run(), []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return codes, NUM_BARE_IMAGES / statistics.median(times)


def in_process(**arguments: object) -> dict:
    """`bare_loop` in a fresh process, so that no allocator setting reaches another mode."""
    command = [sys.executable, __file__, "--bare", json.dumps(arguments)]
    output = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return json.loads(output.stdout.splitlines()[-1])


def job(options: TokenizeOptions) -> tuple[float, float]:
    """Images per second of the whole job, and between its first and last receipt."""
    started = time.time()
    summary = tokenize(options)
    seconds = time.time() - started
    receipts = storage.list_files(storage.join(options.codes.path, "receipts"))
    times = sorted(storage.modified_time(path) for path in receipts)
    steady = (len(times) - 1) * options.codes.shard_size / (times[-1] - times[0])
    return summary.num_rows / seconds, steady


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=12_000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        arguments = json.loads(args.bare)
        images = ImageOptions(size=arguments.pop("size"))
        print(json.dumps(bare_loop(images=images, **arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(folder, args.num_images // CODES.shard_size * CODES.shard_size, args.size, args.repeats)


def measure(folder: str, num_images: int, size: int, repeats: int) -> None:
    """Prints the comparison."""
    source, tokenizer_path = os.path.join(folder, "images"), os.path.join(folder, "tokenizer")
    write_images(source, num_images, size)
    torch.manual_seed(0)
    store_tokenizer(Tokenizer(tokenizer_config(size)), tokenizer_path)
    common = {"tokenizer_path": tokenizer_path, "folder": source, "size": size, "repeats": repeats}
    modes = {mode: in_process(mode=mode, **common) for mode in MODES}
    shipped = modes["as shipped"]
    for mode, found in modes.items():
        same = np.mean(np.array(found["codes"]) == np.array(shipped["codes"]))
        rate = found["images_per_second"]
        ratio = rate / modes["contiguous, default malloc"]["images_per_second"]
        print(f"encoder, {mode}: {rate:.1f} images/s, {ratio:.2f} x; {same:.2%} of codes as shipped")
    options = TokenizeOptions(
        source=SourceOptions(name="image-folder", path=source),
        images=ImageOptions(size=size),
        tokenizer=TokenizerOptions(path=tokenizer_path),
        codes=CodesOptions(path=os.path.join(folder, "codes"), encode_batch_size=32, shard_size=CODES.shard_size),
    )
    with connected():
        whole, steady = job(options)
    after = in_process(mode="as shipped", **common)["images_per_second"]
    bare = (shipped["images_per_second"] + after) / 2
    print(f"bare loop: {shipped['images_per_second']:.1f} images/s before the job, {after:.1f} after")
    print(f"job: {steady:.1f} images/s from first to last shard, ratio {steady / bare:.3f}")
    print(f"job: {whole:.1f} images/s with the start of its processes, ratio {whole / bare:.3f}, {num_images:,} images")


if __name__ == "__main__":
    main()

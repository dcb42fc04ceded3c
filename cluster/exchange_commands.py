"""Commands that take weights from other projects and give them away. Each imports what it needs when it runs."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any


def run_import_tokenizer(args: argparse.Namespace) -> Any:
    from pipeline.storage import absolute, check_reachable
    from pipeline.tokenizers import local_weights, open_project, store_tokenizer
    from stages.first_stage.import_export import import_tokenizer

    output = absolute(args.output)
    check_reachable("file", args.file)
    check_reachable("output", output)
    with local_weights(args.file) as file:
        tokenizer = import_tokenizer(file, args.format, open_project(args.config), args.part)
    return {"tokenizer": output, "fingerprint": store_tokenizer(tokenizer, output)}


def run_import_transformer(args: argparse.Namespace) -> Any:
    from cluster.import_run import ImportTransformerOptions, import_transformer
    from pipeline.storage import absolute, check_reachable

    names = [field.name for field in dataclasses.fields(ImportTransformerOptions)]
    given = {name: getattr(args, name) for name in names}
    for name in ("output", "tokenizer", "condition_tokenizer"):
        given[name] = given[name] and absolute(given[name])
    for name in ("file", "output", "tokenizer"):
        check_reachable(name, given[name])
    return import_transformer(ImportTransformerOptions(**given))


def run_export_tokenizer(args: argparse.Namespace) -> Any:
    from pipeline.storage import absolute, check_reachable
    from pipeline.tokenizers import open_tokenizer, store_export

    path, output = absolute(args.tokenizer), absolute(args.output)
    check_reachable("tokenizer", path)
    check_reachable("output", output)
    tokenizer = open_tokenizer(path)
    file = store_export(tokenizer, args.format, output)
    return {"file": file, "fingerprint": tokenizer.fingerprint}


def run_export(args: argparse.Namespace) -> Any:
    from cluster.export import export
    from pipeline.storage import absolute, check_reachable

    checkpoint, output = absolute(args.checkpoint), absolute(args.output)
    check_reachable("CHECKPOINT", checkpoint)
    check_reachable("--output", output)
    return export(checkpoint, output, which=args.weights, dtype=args.dtype)


def add_exchange_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the commands to a command line.

    Args:
        add: makes a command of a name, a function, a help text and an example.
    """
    importer = add(
        "import-tokenizer",
        run_import_tokenizer,
        "Makes a tokenizer of published weights.",
        "last.ckpt --output runs/tokenizer",
    )
    importer.add_argument("file", help="a checkpoint file, or a diffusers folder")
    importer.add_argument("--format", default="auto", choices=["auto", "compvis", "llamagen", "diffusers"])
    importer.add_argument("--config", metavar="YAML", help="the project file that came with a CompVis checkpoint")
    importer.add_argument(
        "--part",
        default="first_stage",
        choices=["first_stage", "cond_stage"],
        help="which tokenizer of a transformer's checkpoint",
    )
    importer.add_argument("--output", required=True, help="folder of the new tokenizer")
    taker = add(
        "import-transformer",
        run_import_transformer,
        "Makes a run of a published transformer, to sample from and train on.",
        "last.ckpt --config project.yaml --output runs/cin --tokenizer runs/cin-tokenizer",
    )
    taker.add_argument("file", help="a checkpoint of CompVis' Net2NetTransformer or of LlamaGen's class-conditional GPT")
    taker.add_argument("--format", default="auto", choices=["auto", "compvis", "llamagen"])
    taker.add_argument("--config", metavar="YAML", help="the project file that came with a CompVis checkpoint")
    taker.add_argument("--output", required=True, help="folder of the new run")
    taker.add_argument("--tokenizer", required=True, help="folder of its tokenizer, made if the checkpoint holds one")
    taker.add_argument("--condition-tokenizer", metavar="DIR", help="folder for the tokenizer of its condition")
    taker.add_argument("--num-heads", type=int, metavar="N", help="attention heads, where nothing else tells")
    taker.add_argument("--num-classes", type=int, metavar="N", help="classes, where nothing else tells; 0: no condition")
    taker.add_argument("--image-size", type=int, metavar="PX", help="side of its images; the tokenizer's if not given")
    tokenizer_exporter = add(
        "export-tokenizer", run_export_tokenizer, "The way back.", "runs/tokenizer --format diffusers --output exported"
    )
    tokenizer_exporter.add_argument("tokenizer", help="folder of a tokenizer")
    tokenizer_exporter.add_argument("--format", required=True, choices=["compvis", "llamagen", "diffusers"])
    tokenizer_exporter.add_argument("--output", required=True, help="folder for the weights")
    exporter = add(
        "export",
        run_export,
        "Writes a checkpoint's weights for inference as safetensors.",
        "runs/default/checkpoints/step-000010000-5f2c… --output exported",
    )
    exporter.add_argument("checkpoint", help="folder of a checkpoint, of any world size and ZeRO stage")
    exporter.add_argument("--output", required=True, help="folder for transformer.safetensors and config.json")
    exporter.add_argument(
        "--weights", default="average", choices=["average", "last"], help="averaged, where it has them"
    )
    exporter.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])

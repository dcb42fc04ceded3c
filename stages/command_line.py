"""The command line: a subcommand per job, and what each takes."""

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any

Run = Callable[[argparse.Namespace], Any]


def build_parser(description: str, runs: Mapping[str, Run]) -> argparse.ArgumentParser:
    """The command line.

    Args:
        description: of the whole program.
        runs: by command, what runs it; the parsed arguments have it as `run`.
    """
    parser = argparse.ArgumentParser(
        prog="ray_job.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example:\n  python ray_job.py {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--json", action="store_true", help="print one JSON summary as the last line of stdout")
        command.set_defaults(run=runs[name])
        return command

    def configured(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
        command.add_argument(
            "-c",
            "--config",
            required=True,
            action="append",
            metavar="CONFIG",
            help="YAML file, see docs/configuration.md; given again, its keys go over those of the files before",
        )
        command.add_argument("overrides", nargs="*", metavar="section.key=value", help="merged on top of the files")
        return command

    demo = add("demo", "Everything once, small, in minutes.", "--output demo_output")
    demo.add_argument("--output", default="demo_output", help="folder for all artefacts and the report")
    demo.add_argument("--source", default="scenes", help="scenes, fashion-mnist, or a folder of images")
    plan = configured(
        add(
            "plan",
            "Checks a configuration and prints what follows from it.",
            "-c configs/imagenet.yaml -c configs/models/llamagen-b.yaml --gpu H100",
        )
    )
    plan.add_argument(
        "--gpu", metavar="NAME", help="A100, H100, H200, B200 or L40S: hours, and whether memory suffices"
    )
    plan.add_argument(
        "--mfu", type=float, default=0.4, help="share of the GPU's peak that the run reaches (%(default)s)"
    )
    plan.add_argument("--hours", type=float, help="how fast the run must be to take so long")
    configured(add("train-tokenizer", "Trains the VQGAN.", "-c configs/demo.yaml"))
    importer = add(
        "import-tokenizer",
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
    transformer_importer = add(
        "import-transformer",
        "Makes a run of a published transformer, to sample from and train on.",
        "last.ckpt --config project.yaml --output runs/cin --tokenizer runs/cin-tokenizer",
    )
    transformer_importer.add_argument(
        "file", help="a checkpoint of CompVis' Net2NetTransformer or of LlamaGen's class-conditional GPT"
    )
    transformer_importer.add_argument("--format", default="auto", choices=["auto", "compvis", "llamagen"])
    transformer_importer.add_argument(
        "--config", metavar="YAML", help="the project file that came with a CompVis checkpoint"
    )
    transformer_importer.add_argument("--output", required=True, help="folder of the new run")
    transformer_importer.add_argument(
        "--tokenizer", required=True, help="folder of its tokenizer, made if the checkpoint holds one"
    )
    transformer_importer.add_argument(
        "--condition-tokenizer", metavar="DIR", help="folder for the tokenizer of its condition, where the checkpoint holds one"
    )
    transformer_importer.add_argument(
        "--num-heads", type=int, metavar="N", help="attention heads, where nothing else tells"
    )
    transformer_importer.add_argument(
        "--num-classes", type=int, metavar="N", help="classes, where nothing else tells; 0: no condition"
    )
    transformer_importer.add_argument(
        "--image-size", type=int, metavar="PX", help="side of its images; the tokenizer's if not given"
    )
    tokenizer_exporter = add("export-tokenizer", "The way back.", "runs/tokenizer --format diffusers --output exported")
    tokenizer_exporter.add_argument("tokenizer", help="folder of a tokenizer")
    tokenizer_exporter.add_argument("--format", required=True, choices=["compvis", "llamagen", "diffusers"])
    tokenizer_exporter.add_argument("--output", required=True, help="folder for the weights")
    tokenize = configured(
        add(
            "tokenize",
            "Turns images into a code dataset.",
            "-c configs/demo.yaml codes.path=s3://bucket/codes",
        )
    )
    tokenize.add_argument("--gc", action="store_true", help="only delete what dead attempts left in codes.path")
    inspect = add(
        "inspect",
        "Shows what a code dataset holds.",
        "runs/codes --tokenizer runs/tokenizer --output runs/inspection",
    )
    inspect.add_argument("path", help="folder of a code dataset")
    inspect.add_argument("--tokenizer", metavar="PATH", help="decodes rows for the picture; needs --output")
    inspect.add_argument("--output", metavar="DIR", help="folder for codebook.csv and, with --tokenizer, rows.png")
    verify = add("verify", "Checks any artefact to the last byte.", "runs/codes")
    verify.add_argument("path", help="tokenizer, code dataset, run, checkpoint or evaluation record")
    configured(
        add(
            "train",
            "Trains the transformer; resumes by itself.",
            "-c configs/demo.yaml train.num_steps=2000",
        )
    )
    exporter = add(
        "export",
        "Writes a checkpoint's weights for inference as safetensors.",
        "runs/default/checkpoints/step-000010000-5f2c… --output exported",
    )
    exporter.add_argument("checkpoint", help="folder of a checkpoint, of any world size and ZeRO stage")
    exporter.add_argument("--output", required=True, help="folder for transformer.safetensors and config.json")
    exporter.add_argument(
        "--weights", default="average", choices=["average", "last"], help="averaged, where it has them"
    )
    exporter.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    foreign_exporter = add(
        "export-transformer",
        "Writes a checkpoint's transformer as another project stores it.",
        "runs/default/checkpoints/step-000010000-5f2c… --format llamagen --output exported",
    )
    foreign_exporter.add_argument("checkpoint", help="folder of a checkpoint, of any world size and ZeRO stage")
    foreign_exporter.add_argument("--format", required=True, choices=["compvis", "llamagen"])
    foreign_exporter.add_argument("--output", required=True, help="folder for the weights and the parameters of the model")
    foreign_exporter.add_argument(
        "--weights", default="average", choices=["average", "last"], help="averaged, where it has them"
    )
    sample = configured(add("sample", "Draws samples.", "-c configs/demo.yaml sampling.cfg_scale=2"))
    sample.add_argument("--checkpoint", default="latest", help='a checkpoint folder, or "latest" of run.path')
    evaluate = configured(add("evaluate", "Measures a checkpoint.", "-c configs/demo.yaml --checkpoint latest"))
    evaluate.add_argument("--checkpoint", default="latest", help='a checkpoint folder, or "latest" of run.path')
    evaluate.add_argument("--tokenizer", action="store_true", help="measure the tokenizer at tokenizer.path alone")
    modes = evaluate.add_mutually_exclusive_group()
    modes.add_argument("--verify", metavar="RECORD", help="recompute this record and say what differs")
    modes.add_argument("--compare", metavar="RECORD", help="measure, and compare with this record")
    modes.add_argument("--sweep", action="store_true", help="search for the best sampling options, see docs/nightly.md")
    reference = configured(
        add(
            "reference",
            "Computes the statistics that images are measured against.",
            "-c configs/imagenet.yaml evaluation.metrics=[fid,sfid] --output imagenet-256.npz",
        )
    )
    reference.add_argument("--output", metavar="FILE", help="also write them as an .npz that pytorch-fid reads")
    configured(add("nightly", "Evaluates what is new, once each, and renders the report.", "-c configs/demo.yaml"))
    submit = add("submit", "Runs a command as a Ray job and follows it.", "-- train -c configs/demo.yaml")
    submit.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS"),
        metavar="URL",
        help="dashboard of the head, http://HEAD:8265; RAY_API_SERVER_ADDRESS if not given",
    )
    submit.add_argument("--job-id", metavar="NAME", help="name of the job; made up if not given")
    submit.add_argument("--no-wait", action="store_true", help="return once the job is submitted")
    submit.add_argument("--follow", metavar="NAME", help="follow a job that is there already, without submitting one")
    submit.add_argument("--python", default="python", metavar="PATH", help="the interpreter on the head")
    submit.add_argument(
        "--retry-seconds",
        type=float,
        default=60.0,
        metavar="N",
        help="how long a lost connection is tried to be regained",
    )
    submit.add_argument("command_line", nargs=argparse.REMAINDER, help="a ray_job.py command with its arguments")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Parses the command line; overrides may stand anywhere after the command."""
    args, rest = parser.parse_known_args(arguments)
    strays = [text for text in rest if text.startswith("-") or "=" not in text or not hasattr(args, "overrides")]
    if strays:
        parser.error(f"unrecognized arguments: {' '.join(strays)}")
    if rest:
        args.overrides += rest
    return args

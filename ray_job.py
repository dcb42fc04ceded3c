"""Tessera's one entry point: `python ray_job.py COMMAND …`, on a laptop, on a cluster, or inside `ray job submit`.

Each command turns a configuration into the options of one function and calls it. Exit codes: 0 done, 1 failed or damaged,
2 usage or configuration.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from stages.config import load_config, to_dict
from stages.errors import ConfigError, TesseraError
from stages.options import Config


def checked_config(args: argparse.Namespace) -> Config:
    """The configuration of a command line, with every check that needs no actor."""
    from cluster.job_plan import check_config

    config = load_config(args.config, args.overrides)
    check_config(config)
    return config


def run_plan(args: argparse.Namespace) -> Any:
    from cluster.job_plan import derive, render
    from pipeline.job_options import section_paths
    from pipeline.sources import open_source
    from pipeline.storage import check_reachable

    config = checked_config(args)
    for name, path in section_paths(config.source).items():
        check_reachable(f"source.{name}", path)
    source = open_source(config.source, config.images)
    derived = derive(
        config,
        len(source.list_images("train")),
        len(source.class_names),
        gpu=args.gpu,
        mfu=args.mfu,
        hours=args.hours,
    )
    print(render(config, derived))
    return {"config": to_dict(config), "derived": derived}


def run_train_tokenizer(args: argparse.Namespace) -> Any:
    from cluster.runtime import connected
    from cluster.tokenizer_job import train_tokenizer
    from cluster.tokenizer_loop import TokenizerJobOptions
    from pipeline.job_options import select

    options = select(TokenizerJobOptions, checked_config(args))
    with connected():
        return train_tokenizer(options)


def run_import_tokenizer(args: argparse.Namespace) -> Any:
    from pipeline.storage import absolute, check_reachable
    from pipeline.tokenizers import local_weights, store_tokenizer
    from stages.first_stage.import_export import import_tokenizer

    output = absolute(args.output)
    check_reachable("file", args.file)
    check_reachable("output", output)
    with local_weights(args.file) as file:
        tokenizer = import_tokenizer(file, args.format)
    return {"tokenizer": output, "fingerprint": store_tokenizer(tokenizer, output)}


def run_export_tokenizer(args: argparse.Namespace) -> Any:
    from pipeline.storage import absolute, check_reachable
    from pipeline.tokenizers import open_tokenizer, store_export

    path, output = absolute(args.tokenizer), absolute(args.output)
    check_reachable("tokenizer", path)
    check_reachable("output", output)
    tokenizer = open_tokenizer(path)
    file = store_export(tokenizer, args.format, output)
    return {"file": file, "fingerprint": tokenizer.fingerprint}


def run_tokenize(args: argparse.Namespace) -> Any:
    from cluster.runtime import connected
    from pipeline.job_options import select
    from pipeline.tokenize_images import TokenizeOptions, tokenize

    options = select(TokenizeOptions, checked_config(args))
    if args.gc:
        from pipeline.code_dataset.garbage import collect_garbage

        deleted = collect_garbage(options.codes.path)
        print(f"{options.codes.path}: {len(deleted)} files deleted")
        return {"dataset": options.codes.path, "deleted": deleted}
    with connected():
        return tokenize(options)


def run_train(args: argparse.Namespace) -> Any:
    from cluster.runtime import connected
    from cluster.train_job import train
    from cluster.train_options import TrainJobOptions
    from pipeline.job_options import select

    options = select(TrainJobOptions, checked_config(args))
    with connected():
        return train(options)


def run_export(args: argparse.Namespace) -> Any:
    from cluster.export import export
    from pipeline.storage import absolute, check_reachable

    checkpoint, output = absolute(args.checkpoint), absolute(args.output)
    check_reachable("CHECKPOINT", checkpoint)
    check_reachable("--output", output)
    return export(checkpoint, output, which=args.weights, dtype=args.dtype)


def run_sample(args: argparse.Namespace) -> Any:
    from cluster.runtime import connected
    from cluster.sample_job import SampleJobOptions, sample
    from pipeline.job_options import select

    options = select(SampleJobOptions, checked_config(args), checkpoint=args.checkpoint)
    with connected():
        return sample(options)


def run_evaluate(args: argparse.Namespace) -> Any:
    from cluster.runtime import connected
    from evaluation.evaluate import EvaluateOptions, evaluate, verify_record
    from pipeline.job_options import select

    checkpoint = None if args.tokenizer else args.checkpoint
    options = select(EvaluateOptions, checked_config(args), checkpoint=checkpoint)
    with connected():
        if args.verify:
            return _verdict(args.verify, verify_record(args.verify, options))
        return evaluate(options).to_summary()


def run_reference(args: argparse.Namespace) -> Any:
    from cluster.runtime import connected
    from evaluation.make_reference import make_references
    from evaluation.reference_job import ReferenceOptions
    from pipeline.job_options import select
    from pipeline.storage import absolute

    options = select(ReferenceOptions, checked_config(args))
    with connected():
        return make_references(options, absolute(args.output) if args.output else None)


def run_nightly(args: argparse.Namespace) -> Any:
    from cluster.runtime import connected
    from evaluation.evaluate import EvaluateOptions
    from evaluation.nightly import nightly
    from pipeline.job_options import select

    options = select(EvaluateOptions, checked_config(args))
    with connected():
        return nightly(options)


def run_inspect(args: argparse.Namespace) -> Any:
    from pipeline.inspect_codes import inspect_codes, render_inspection, write_pictures
    from pipeline.storage import absolute

    inspection = inspect_codes(absolute(args.path))
    print(render_inspection(inspection))
    files = []
    if args.output:
        tokenizer = args.tokenizer and absolute(args.tokenizer)
        files = write_pictures(inspection, tokenizer, absolute(args.output))
    return {**inspection.to_summary(), "files": files}


def run_verify(args: argparse.Namespace) -> Any:
    from evaluation.verify import verify_artefact
    from pipeline.storage import absolute, check_reachable

    path = absolute(args.path)
    check_reachable("PATH", path)
    return _verdict(path, verify_artefact(path))


def _verdict(path: str, problems: list[str]) -> dict[str, Any]:
    for problem in problems:
        print(problem)
    print(f"{path}: " + ("sound" if not problems else f"{len(problems)} problem(s)"))
    return {"path": path, "ok": not problems, "problems": problems}


def run_demo(args: argparse.Namespace) -> Any:
    from cluster.runtime import connected
    from evaluation.demo import DEMO_OBJECT_STORE_BYTES, demo
    from pipeline.storage import absolute

    with connected(object_store_bytes=DEMO_OBJECT_STORE_BYTES):
        return demo(absolute(args.output), args.source)


def run_submit(args: argparse.Namespace) -> Any:
    from cluster.job_client import use_cluster
    from cluster.submit import SubmitOptions, check_command, submit

    words = args.command_line[1:] if args.command_line[:1] == ["--"] else args.command_line
    if bool(words) == bool(args.follow):
        raise ConfigError(
            "The command is empty, but submit runs another command. Write e.g. submit -- train -c configs/demo.yaml."
            if not words
            else f"The command is {words[0]}, but --follow names a job that is there already. Leave one of them out."
        )
    use_cluster(args.address)
    return submit(
        SubmitOptions(
            address=args.address,
            words=check_command(words, parse(build_parser(), words)) if words else (),
            job_id=args.job_id,
            follow=args.follow,
            wait=not args.no_wait,
            python=args.python,
            retry_seconds=args.retry_seconds,
        )
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="ray_job.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], Any], text: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example:\n  python ray_job.py {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--json", action="store_true", help="print one JSON summary as the last line of stdout")
        command.set_defaults(run=run)
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

    demo = add("demo", run_demo, "Everything once, small, in minutes.", "--output demo_output")
    demo.add_argument("--output", default="demo_output", help="folder for all artefacts and the report")
    demo.add_argument("--source", default="scenes", help="scenes, fashion-mnist, or a folder of images")
    plan = configured(
        add(
            "plan",
            run_plan,
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
    configured(add("train-tokenizer", run_train_tokenizer, "Trains the VQGAN.", "-c configs/demo.yaml"))
    importer = add(
        "import-tokenizer",
        run_import_tokenizer,
        "Makes a tokenizer of published weights.",
        "last.ckpt --output runs/tokenizer",
    )
    importer.add_argument("file", help="a checkpoint file, or a diffusers folder")
    importer.add_argument("--format", default="auto", choices=["auto", "compvis", "llamagen", "diffusers"])
    importer.add_argument("--output", required=True, help="folder of the new tokenizer")
    tokenizer_exporter = add(
        "export-tokenizer", run_export_tokenizer, "The way back.", "runs/tokenizer --format diffusers --output exported"
    )
    tokenizer_exporter.add_argument("tokenizer", help="folder of a tokenizer")
    tokenizer_exporter.add_argument("--format", required=True, choices=["compvis", "llamagen", "diffusers"])
    tokenizer_exporter.add_argument("--output", required=True, help="folder for the weights")
    tokenize = configured(
        add(
            "tokenize",
            run_tokenize,
            "Turns images into a code dataset.",
            "-c configs/demo.yaml codes.path=s3://bucket/codes",
        )
    )
    tokenize.add_argument("--gc", action="store_true", help="only delete what dead attempts left in codes.path")
    inspect = add(
        "inspect",
        run_inspect,
        "Shows what a code dataset holds.",
        "runs/codes --tokenizer runs/tokenizer --output runs/inspection",
    )
    inspect.add_argument("path", help="folder of a code dataset")
    inspect.add_argument("--tokenizer", metavar="PATH", help="decodes rows for the picture; needs --output")
    inspect.add_argument("--output", metavar="DIR", help="folder for codebook.csv and, with --tokenizer, rows.png")
    verify = add("verify", run_verify, "Checks any artefact to the last byte.", "runs/codes")
    verify.add_argument("path", help="tokenizer, code dataset, run, checkpoint or evaluation record")
    configured(
        add(
            "train",
            run_train,
            "Trains the transformer; resumes by itself.",
            "-c configs/demo.yaml train.num_steps=2000",
        )
    )
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
    sample = configured(add("sample", run_sample, "Draws samples.", "-c configs/demo.yaml sampling.cfg_scale=2"))
    sample.add_argument("--checkpoint", default="latest", help='a checkpoint folder, or "latest" of run.path')
    evaluate = configured(
        add("evaluate", run_evaluate, "Measures a checkpoint.", "-c configs/demo.yaml --checkpoint latest")
    )
    evaluate.add_argument("--checkpoint", default="latest", help='a checkpoint folder, or "latest" of run.path')
    evaluate.add_argument("--tokenizer", action="store_true", help="measure the tokenizer at tokenizer.path alone")
    evaluate.add_argument("--verify", metavar="RECORD", help="recompute this record and compare")
    reference = configured(
        add(
            "reference",
            run_reference,
            "Computes the statistics that sets of images are measured against.",
            "-c configs/imagenet.yaml --output imagenet-256.npz evaluation.metrics=[fid,sfid]",
        )
    )
    reference.add_argument("--output", metavar="FILE", help="also write them as an .npz that pytorch-fid and ADM read")
    configured(
        add("nightly", run_nightly, "Evaluates what is new, once each, and renders the report.", "-c configs/demo.yaml")
    )
    submit = add("submit", run_submit, "Runs a command as a Ray job and follows it.", "-- train -c configs/demo.yaml")
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


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = parse(build_parser(), arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        summary = args.run(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TesseraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    summary = to_dict(summary) if dataclasses.is_dataclass(summary) else summary
    if args.json:
        print(json.dumps(summary), flush=True)
    return 1 if summary.get("ok") is False else summary.get("exit_code") or 0


if __name__ == "__main__":
    sys.exit(main())

"""Tessera's one entry point: `python ray_job.py COMMAND …`, on a laptop, on a cluster, or inside `ray job submit`.

Each command turns a configuration into the options of one function and calls it. Exit codes: 0 done, 1 failed or damaged,
2 usage or configuration, 3 a nightly found a regression.
"""

import argparse
import dataclasses
import json
import logging
import sys
from typing import Any

from stages import command_line
from stages.command_line import parse
from stages.config import load_config, to_dict
from stages.errors import ConfigError, TesseraError
from stages.options import Config


def checked_config(args: argparse.Namespace) -> Config:
    """The configuration of a command line, with the checks that every command makes."""
    from cluster.job_plan import check_config

    config = load_config(args.config, args.overrides)
    check_config(config)
    return config


def _reachable(key: str, path: str) -> str:
    """A path that means the same in every process of a cluster and in every record, in a store that can be used."""
    from pipeline.storage import absolute, check_reachable

    path = absolute(path, key)
    check_reachable(key, path)
    return path


def _checkpoint(args: argparse.Namespace) -> str:
    """What --checkpoint names: a folder, or "latest" of run.path."""
    return args.checkpoint if args.checkpoint == "latest" else _reachable("--checkpoint", args.checkpoint)


def run_plan(args: argparse.Namespace) -> Any:
    from cluster.job_plan import derive, render, stored_tokenizer
    from evaluation.estimates import check_num_samples
    from evaluation.metrics import plan_metrics
    from pipeline.inputs import needed_maps
    from pipeline.job_options import check_reachable_paths
    from pipeline.sources import list_split, open_source

    config = checked_config(args)
    check_reachable_paths("source", config.source)
    check_reachable_paths("tokenizer", config.tokenizer)
    plan_metrics(config.evaluation)
    check_num_samples(config.evaluation)
    tokenizer = stored_tokenizer(config)
    source = open_source(config.source, config.images, needed_maps(config.tokenizer, config.codes.conditions))
    derived = derive(
        config,
        len(list_split(source, config.source, "train")),
        len(source.class_names),
        tokenizer=tokenizer,
        gpu=args.gpu,
        mfu=args.mfu,
        hours=args.hours,
    )
    print(render(config, derived))
    return {"config": to_dict(config), "derived": derived}


def run_train_tokenizer(args: argparse.Namespace) -> Any:
    from cluster.runtime import connected
    from cluster.tokenizer_job import train_tokenizer
    from cluster.tokenizer_options import TokenizerJobOptions, check_networks
    from pipeline.job_options import select

    options = select(TokenizerJobOptions, checked_config(args))
    check_networks(options.tokenizer, options.tokenizer_train, options.images)  # before Ray is started
    with connected():
        return train_tokenizer(options)


def run_import_tokenizer(args: argparse.Namespace) -> Any:
    from pipeline.storage import check_reachable
    from pipeline.tokenizers import local_weights, open_project, store_tokenizer
    from stages.first_stage.import_export import import_tokenizer

    output = _reachable("output", args.output)
    check_reachable("file", args.file)
    with local_weights(args.file) as file:
        tokenizer = import_tokenizer(file, args.format, open_project(args.config), args.part)
    return {"tokenizer": output, "fingerprint": store_tokenizer(tokenizer, output)}


def run_import_transformer(args: argparse.Namespace) -> Any:
    from cluster.import_run import ImportTransformerOptions, import_transformer
    from pipeline.storage import absolute, check_reachable

    names = [field.name for field in dataclasses.fields(ImportTransformerOptions)]
    given = {name: getattr(args, name) for name in names}
    for name in ("output", "tokenizer", "condition_tokenizer"):
        given[name] = given[name] and absolute(given[name], name)
    for name in ("file", "output", "tokenizer"):
        check_reachable(name, given[name])
    return import_transformer(ImportTransformerOptions(**given))


def run_export_tokenizer(args: argparse.Namespace) -> Any:
    from pipeline.tokenizers import open_tokenizer, store_export

    path, output = _reachable("tokenizer", args.tokenizer), _reachable("output", args.output)
    tokenizer = open_tokenizer(path)
    file = store_export(tokenizer, args.format, output)
    return {"file": file, "fingerprint": tokenizer.fingerprint}


def run_export_transformer(args: argparse.Namespace) -> Any:
    from cluster.export import export_transformer

    checkpoint, output = _reachable("CHECKPOINT", args.checkpoint), _reachable("--output", args.output)
    return export_transformer(checkpoint, output, format=args.format, which=args.weights)


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

    checkpoint, output = _reachable("CHECKPOINT", args.checkpoint), _reachable("--output", args.output)
    return export(checkpoint, output, which=args.weights, dtype=args.dtype)


def run_sample(args: argparse.Namespace) -> Any:
    from cluster.runtime import connected
    from cluster.sample_job import SampleJobOptions, sample
    from pipeline.job_options import select

    options = select(SampleJobOptions, checked_config(args), checkpoint=_checkpoint(args))
    with connected():
        return sample(options)


def run_evaluate(args: argparse.Namespace) -> Any:
    from cluster.runtime import connected
    from evaluation.compare import evaluate_and_compare
    from evaluation.evaluate import EvaluateOptions, evaluate, verify_record
    from evaluation.sweep import sweep
    from pipeline.job_options import select

    if args.tokenizer and args.sweep:
        raise ConfigError("--sweep is given with --tokenizer, but a tokenizer alone draws no samples. Leave one of them out.")
    config = checked_config(args)
    checkpoint = None if args.tokenizer else _checkpoint(args)
    verify = args.verify and _reachable("--verify", args.verify)
    compare = args.compare and _reachable("--compare", args.compare)
    options = select(EvaluateOptions, config, checkpoint=checkpoint)
    with connected():
        if verify:
            return _verdict(verify, verify_record(verify, options))
        if compare:
            return evaluate_and_compare(options, compare)
        if args.sweep:
            return sweep(options, config.sweep)
        return evaluate(options).to_summary()


def run_reference(args: argparse.Namespace) -> Any:
    from cluster.runtime import connected
    from evaluation.reference_features import ReferenceOptions
    from evaluation.reference_job import make_references
    from pipeline.job_options import select

    options = select(ReferenceOptions, checked_config(args))
    output = args.output and _reachable("--output", args.output)
    with connected():
        return make_references(options, output)


def run_nightly(args: argparse.Namespace) -> Any:
    from cluster.runtime import connected
    from evaluation.evaluate import EvaluateOptions
    from evaluation.nightly import nightly
    from pipeline.job_options import check_reachable_paths, select

    config = checked_config(args)
    options = select(EvaluateOptions, config)
    check_reachable_paths("nightly", config.nightly)
    with connected():
        return nightly(options, config.nightly)


def run_inspect(args: argparse.Namespace) -> Any:
    from pipeline.inspect_codes import inspect_codes, render_inspection, write_pictures

    path = _reachable("PATH", args.path)
    tokenizer = args.tokenizer and _reachable("--tokenizer", args.tokenizer)
    output = args.output and _reachable("--output", args.output)
    inspection = inspect_codes(path)
    print(render_inspection(inspection))
    files = write_pictures(inspection, tokenizer, output) if output else []
    return {**inspection.to_summary(), "files": files}


def run_verify(args: argparse.Namespace) -> Any:
    from evaluation.verify import verify_artefact

    path = _reachable("PATH", args.path)
    return _verdict(path, verify_artefact(path))


def _verdict(path: str, problems: list[str]) -> dict[str, Any]:
    for problem in problems:
        print(problem)
    print(f"{path}: " + ("sound" if not problems else f"{len(problems)} problem(s)"))
    return {"path": path, "ok": not problems, "problems": problems}


def run_demo(args: argparse.Namespace) -> Any:
    from cluster.runtime import connected
    from evaluation.demo import DEMO_OBJECT_STORE_BYTES, demo

    output = _reachable("--output", args.output)
    with connected(object_store_bytes=DEMO_OBJECT_STORE_BYTES):
        return demo(output, args.source)


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
    address = use_cluster(args.address)  # first: checking the command imports Ray
    return submit(
        SubmitOptions(
            address=address,
            words=check_command(words, parse(build_parser(), words)) if words else (),
            job_id=args.job_id,
            follow=args.follow,
            wait=not args.no_wait,
            python=args.python,
            retry_seconds=args.retry_seconds,
        )
    )


COMMANDS = {
    "demo": run_demo,
    "plan": run_plan,
    "train-tokenizer": run_train_tokenizer,
    "import-tokenizer": run_import_tokenizer,
    "import-transformer": run_import_transformer,
    "export-tokenizer": run_export_tokenizer,
    "tokenize": run_tokenize,
    "inspect": run_inspect,
    "verify": run_verify,
    "train": run_train,
    "export": run_export,
    "export-transformer": run_export_transformer,
    "sample": run_sample,
    "evaluate": run_evaluate,
    "reference": run_reference,
    "nightly": run_nightly,
    "submit": run_submit,
}


def build_parser() -> argparse.ArgumentParser:
    """The command line of all commands."""
    return command_line.build_parser(__doc__ or "", COMMANDS)


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

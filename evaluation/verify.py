"""`verify`: finds out what an artefact is and checks it to the last byte."""

from collections.abc import Callable
from typing import Any

from cluster import checkpoints
from cluster.tokenizer_options import training_path
from cluster.verify_run import verify_run
from evaluation.records import read_record
from pipeline import storage
from pipeline.code_dataset.verify import verify_code_dataset
from pipeline.tokenizers import open_tokenizer
from stages.errors import ArtefactError
from stages.first_stage.artefact import CONFIG


def verify_artefact(path: str) -> list[str]:
    """Problems of the tokenizer (with its training), code dataset, run, checkpoint or evaluation record at `path`; empty when it is sound.

    Raises:
        ArtefactError: there is nothing at the path, or nothing known.
    """
    if path.endswith(".json"):
        return _problems(lambda: read_record(path))
    names = {file[len(path.rstrip("/")) + 1 :] for file in storage.list_files(path)}
    if not names:
        raise ArtefactError(f"PATH is {path}, but there is nothing there. Name an existing artefact.")
    tops = {name.split("/")[0] for name in names}
    if {"versions", "plans", "manifests"} & tops:
        return verify_code_dataset(path)
    if checkpoints.COMMIT in names:
        return checkpoints.commit_problems(checkpoints.open_commit(path))
    if CONFIG in names:
        training = verify_run(training_path(path)) if "training" in tops else []
        return _problems(lambda: open_tokenizer(path)) + training
    if "checkpoints" in tops:
        return verify_run(path)
    raise ArtefactError(
        f"PATH is {path}, but it is no tokenizer, code dataset, run, checkpoint or record. Name one of these."
    )


def _problems(read: Callable[[], Any]) -> list[str]:
    try:
        read()
    except ArtefactError as error:
        return [str(error)]
    return []

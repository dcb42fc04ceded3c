"""Errors meant for users. `ray_job.py` prints them without a traceback; everything else is a defect and keeps its traceback."""


class TesseraError(Exception):
    """Something the user can mend. The text reads `<key> is <value>, but <rule>. <What to do>.` Exit code 1."""


class ConfigError(TesseraError, ValueError):
    """A configuration or command line that cannot be run. Exit code 2."""


class ArtefactError(TesseraError):
    """An artefact (tokenizer, code dataset, checkpoint, record) that is missing, unfinished, damaged or bound to another one."""


class StorageError(TesseraError, OSError):
    """A store that cannot be reached, refuses access or fails. An OSError too, so what retries faults of storage retries it."""


class BadImage(Exception):
    """The content of one image cannot be used. Becomes a quarantined row, never a failed job.

    Args:
        kind: short class of the fault, counted in the manifest (`undecodable`, `empty`, `too-small`, `decompression-bomb` ...).
        message: what the decoder said.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(kind, message)
        self.kind = kind
        self.message = message

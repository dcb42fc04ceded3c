import importlib.metadata

from pipeline.lineage import lineage
from stages import __version__


def test_the_version_is_that_of_the_code_which_need_not_be_installed(monkeypatch):
    assert importlib.metadata.version("tessera") == __version__

    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    assert lineage()["tessera"] == __version__


def test_the_commit_is_named_by_who_brought_the_code_along(monkeypatch):
    monkeypatch.setenv("TESSERA_GIT_SHA", "0123abc")
    assert lineage()["git_sha"] == "0123abc"

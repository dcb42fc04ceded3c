"""The run log: digests add up over ranks, segments are checked, the chain tells any other history apart."""

import pytest

from cluster import run_log
from stages.errors import ArtefactError


def records(digests):
    return [run_log.step_record(step, step, 1.0, [digest]) for step, digest in enumerate(digests)]


def test_the_chain_does_not_depend_on_the_world_size():
    one = run_log.step_record(0, 0, 1.0, [(5 + 2**64 - 3) % 2**64])
    two = run_log.step_record(0, 0, 1.0, [5, 2**64 - 3])
    assert run_log.global_digest(one) == run_log.global_digest(two) == 2
    assert run_log.chain(run_log.EMPTY_HASH, [one]) == run_log.chain(run_log.EMPTY_HASH, [two])


def test_the_chain_can_be_continued():
    all_at_once = run_log.chain(run_log.EMPTY_HASH, records([1, 2, 3]))
    first = run_log.chain(run_log.EMPTY_HASH, records([1, 2, 3])[:1])
    assert run_log.chain(first, records([1, 2, 3])[1:]) == all_at_once


@pytest.mark.parametrize("other", [[1, 2], [1, 2, 4], [2, 1, 3], [1, 2, 3, 0]])
def test_any_other_history_has_another_hash(other):
    assert run_log.chain(run_log.EMPTY_HASH, records(other)) != run_log.chain(run_log.EMPTY_HASH, records([1, 2, 3]))


def test_segments_read_back_and_damage_is_seen(tmp_path):
    run = str(tmp_path)
    segments = [run_log.write_segment(run, "a", records([1, 2])), run_log.write_segment(run, "b", records([7]))]
    assert run_log.read_log(run, segments) == records([1, 2]) + records([7])
    path = tmp_path / segments[0]["path"]
    path.write_text(path.read_text().replace("1.0", "2.0"))
    with pytest.raises(ArtefactError, match="damaged"):
        run_log.read_log(run, segments)
    path.unlink()
    with pytest.raises(ArtefactError, match="missing"):
        run_log.read_log(run, segments)


def test_steps_that_are_made_again_do_not_mix_with_those_that_were_undone(tmp_path):
    run = str(tmp_path)
    undone, again = (run_log.write_segment(run, "step-2-a", records(digests)) for digests in ([1, 2], [1, 3]))
    assert run_log.read_log(run, [again]) == records([1, 3])
    assert run_log.read_log(run, [undone]) == records([1, 2])


def test_the_tail_of_a_log_is_read_without_the_rest(tmp_path):
    run, log = str(tmp_path), records([1, 2, 3, 4, 5])
    segments = [run_log.write_segment(run, name, part) for name, part in zip("abc", (log[:2], log[2:4], log[4:]))]
    (tmp_path / segments[0]["path"]).unlink()
    assert run_log.read_tail(run, segments, 2) == log[2:]
    assert run_log.read_tail(run, segments, 0) == []
    with pytest.raises(ArtefactError, match="missing"):
        run_log.read_tail(run, segments, 4)

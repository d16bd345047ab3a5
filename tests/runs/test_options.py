"""Which questions a reproduction asks, and where their records go."""

import pytest

from frugalvlm.checks import OptionError
from frugalvlm.runs.options import Options, pocket_setting


def test_a_second_set_of_questions_has_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(tmp_path))
    first, second = (
        pocket_setting("visionzip", Options(split=split), "w") for split in ("test", "replication")
    )
    assert (first.split, second.split) == ("test", "replication")
    own = tmp_path / "pocket" / "visionzip"
    assert first.folder == own / "records"
    assert second.folder == own / "replication" / "records"
    tiles = pocket_setting("visionzip", Options(split="replication"), "w", "pocket-llava-hd")
    assert tiles.folder == own / "replication" / "pocket-llava-hd" / "records"


def test_what_things_are_chosen_with_is_not_reported() -> None:
    with pytest.raises(OptionError, match="split is test or replication; got 'dev'"):
        Options(split="dev")

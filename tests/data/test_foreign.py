"""Token files of other projects: read as they are, copies of LlamaGen's padding left out, faults named; and the check of a set."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orderlab.config import UserError
from orderlab.data.foreign import check, import_tokens, picture
from orderlab.data.tokenize import TokenizeConfig, run
from orderlab.data.tokens import TokenMeta, TokenSet
from tests.conftest import WORDNET_IDS

META = TokenMeta(tokenizer="t", tokenizer_hash="unknown", grid=(4, 4), vocabulary=100, classes=1, images=0, views=[], source="")
CODES = np.random.default_rng(0).integers(0, 100, (7, 10, 16))
LABELS = np.array([3, 0, 1, 1, 2, 0, 3])


def llamagen(folder: Path, padded: int) -> Path:
    (folder / "imagenet256_codes").mkdir(parents=True)
    (folder / "imagenet256_labels").mkdir()
    for place in range(len(CODES) + padded):
        image = place % len(CODES)
        np.save(folder / f"imagenet256_codes/{place}.npy", CODES[image][None])
        np.save(folder / f"imagenet256_labels/{place}.npy", LABELS[image][None])
    return folder


@pytest.mark.parametrize("padded", [0, 1, 3])
def test_llamagens_folders_without_the_padding_of_its_processes(tmp_path: Path, padded: int) -> None:
    found = import_tokens(llamagen(tmp_path / "codes", padded), tmp_path / "out", META)
    assert np.array_equal(found.tokens, CODES)
    assert found.labels.tolist() == LABELS.tolist()
    assert (found.meta.classes, len(found.meta.views)) == (4, 10)
    assert (f"{padded} padded copies" in found.meta.source) == (padded > 0)


def test_rars_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"class_id": int(label), "tokens": codes[0].tolist()}) for label, codes in zip(LABELS, CODES)]
    (tmp_path / "maskgitvq.jsonl").write_text("\n".join(lines) + "\n")
    found = import_tokens(tmp_path / "maskgitvq.jsonl", tmp_path / "out", META)
    assert np.array_equal(found.tokens, CODES[:, :1])
    assert found.labels.tolist() == LABELS.tolist()
    (tmp_path / "maskgitvq.jsonl").write_text("\n".join(lines)[:-20])
    with pytest.raises(UserError, match=r"line 7 cannot be read .*may be cut"):
        import_tokens(tmp_path / "maskgitvq.jsonl", tmp_path / "cut", META)
    assert not (tmp_path / "cut").exists()
    assert not (tmp_path / "cut.part").exists()


@pytest.mark.parametrize(("names", "labels"), [(("n01440764", "n01443537"), [0, 0, 1]), (("2", "10"), [2, 2, 10])])
def test_class_folders(tmp_path: Path, names: tuple[str, str], labels: list[int]) -> None:
    for place, name in enumerate((names[0], names[0], names[1])):
        (tmp_path / "codes" / name).mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "codes" / name / f"{place}.npy", CODES[place].astype(np.int32))
    found = import_tokens(tmp_path / "codes", tmp_path / "out", META)
    assert sorted(found.labels.tolist()) == labels
    assert {row.tobytes() for row in found.tokens} == {row.astype(np.uint16).tobytes() for row in CODES[:3]}


def test_the_last_axis_is_the_grid_never_views(tmp_path: Path) -> None:
    """An array of a larger grid must not become four views of a quarter of the image each."""
    folder = tmp_path / "codes"
    for part in ("codes", "labels"):
        (folder / f"imagenet512_{part}").mkdir(parents=True)
    np.save(folder / "imagenet512_codes/0.npy", np.arange(64).reshape(1, 1, 64))
    np.save(folder / "imagenet512_labels/0.npy", np.array([3]))
    with pytest.raises(UserError, match=r"\[1, 1, 64\]; expected .* last axis has the 16 positions of --grid or with --grid 8x8"):
        import_tokens(folder, tmp_path / "out", META)
    assert len(import_tokens(folder, tmp_path / "out", META.edited(grid=(8, 8))).meta.views) == 1
    (tmp_path / "rar.jsonl").write_text(json.dumps({"class_id": 1, "tokens": list(range(64))}))
    with pytest.raises(UserError, match="--grid 8x8"):
        import_tokens(tmp_path / "rar.jsonl", tmp_path / "out2", META)


def test_hidden_and_empty_folders_are_no_classes(tmp_path: Path) -> None:
    for name in ("0", "1", "2", "10"):
        (tmp_path / "codes" / name).mkdir(parents=True)
        np.save(tmp_path / "codes" / name / "a.npy", CODES[0, 0])
        (tmp_path / "codes" / name / "._a.npy").write_bytes(b"macOS")
    (tmp_path / "codes/.ipynb_checkpoints").mkdir()
    np.save(tmp_path / "codes/.ipynb_checkpoints/a.npy", CODES[0, 0])
    (tmp_path / "codes/nothing").mkdir()
    found = import_tokens(tmp_path / "codes", tmp_path / "out", META)
    assert sorted(found.labels.tolist()) == [0, 1, 2, 10]
    assert (found.meta.classes, found.class_names) == (11, None)
    (tmp_path / "codes/01").mkdir()
    np.save(tmp_path / "codes/01/a.npy", CODES[0, 0])
    with pytest.raises(UserError, match="has the classes 0, 01, 1, 10, 2: expected numbers below 65536, each once"):
        import_tokens(tmp_path / "codes", tmp_path / "again", META)


def test_files_of_other_kinds_are_one_line(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", CODES[0])
    (tmp_path / "b.bin").write_bytes(bytes(range(256)))
    (tmp_path / "c.jsonl").write_bytes(b'{"class_id": 1, "tokens": [\xff\xfe]}')
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "a.npy", arcname="a.npy")
    (tmp_path / "e.jsonl").write_text("")
    for name, says in (
        ("a.npy", "no JSON object"),
        ("b.bin", "no JSON object"),
        ("c.jsonl", "line 1"),
        ("x.tar", "unpack it first"),
        ("e.jsonl", "no JSON"),
    ):
        with pytest.raises(UserError, match=says):
            import_tokens(tmp_path / name, tmp_path / "out", META)


def test_foreign_faults_are_one_line(tmp_path: Path) -> None:
    folder = llamagen(tmp_path / "codes", 0)
    with pytest.raises(UserError, match=r"highest code 99.*codes below 50 \(--vocabulary\)"):
        import_tokens(folder, tmp_path / "out", META.edited(vocabulary=50))
    with pytest.raises(UserError, match=r"last axis has the 9 positions of --grid or with --grid 4x4, if that is theirs"):
        import_tokens(folder, tmp_path / "out", META.edited(grid=(3, 3)))
    (folder / "imagenet256_codes/4.npy").unlink()
    with pytest.raises(UserError, match=r"4\.npy does not exist"):
        import_tokens(folder, tmp_path / "out", META)
    with pytest.raises(UserError, match="is no token folder"):
        import_tokens(tmp_path, tmp_path.with_name("elsewhere"), META)


def test_check_counts_and_finds(tmp_path: Path) -> None:
    token_set = import_tokens(llamagen(tmp_path / "codes", 0), tmp_path / "out", META)
    found = check(token_set)
    assert found["problems"] == []
    assert found["images_per_class"] == {"fewest": 1, "most": 2, "histogram": [2, 2, 1, 2]}
    assert found["codes"] == {"lowest": 0, "highest": 99, "used": len(np.unique(CODES))}
    assert found["duplicates"]["count"] == 0
    spoilt = np.load(tmp_path / "out/tokens.npy")
    spoilt[5], spoilt[2, 0, 0] = spoilt[1], 4000
    np.save(tmp_path / "out/tokens.npy", spoilt)
    np.save(tmp_path / "out/labels.npy", np.array([0, 0, 1, 1, 3, 0, 4], dtype=np.int32))
    found = check(TokenSet(tmp_path / "out"))
    assert found["duplicates"] == {"count": 1, "first": [(1, 5)]}
    assert [problem.split()[0] for problem in found["problems"]] == ["code", "labels", "1"]


def test_stored_items_are_decoded_to_a_picture(image_tree: Path, small_vq: Path, tmp_path: Path) -> None:
    run(TokenizeConfig(images=image_tree / "train", out=tmp_path / "tokens", tokenizer=str(small_vq), size=64, flip=True))
    token_set = TokenSet(tmp_path / "tokens")
    assert picture(token_set, tmp_path / "p.png", 3, str(small_vq)) == [0, 24, 47]
    assert Image.open(tmp_path / "p.png").size == (128, 192)  # two views in a row, three images
    meta = json.loads((tmp_path / "tokens/meta.json").read_text())
    assert meta["class_names"] == list(WORDNET_IDS)
    (tmp_path / "tokens/meta.json").write_text(json.dumps({**meta, "grid": [4, 16]}))
    picture(TokenSet(tmp_path / "tokens"), tmp_path / "wide.png", 3, str(small_vq))
    assert Image.open(tmp_path / "wide.png").size == (256, 96)
    (tmp_path / "tokens/meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="one item or more"):
        picture(token_set, tmp_path / "p.png", 0, str(small_vq))
    with pytest.raises(UserError, match="or name the right weight file"):
        picture(TokenSet(tmp_path / "tokens"), tmp_path / "p.png", 3, "fashion-8x8")
    with pytest.raises(UserError, match="unknown tokenizer"):
        picture(token_set, tmp_path / "p.png", 3)  # meta.json holds the file's name, not its place


def rar_file(file: Path) -> Path:
    file.write_text(
        "".join(json.dumps({"class_id": int(label), "tokens": codes[0].tolist()}) + "\n" for label, codes in zip(LABELS, CODES))
    )
    return file


def test_nothing_but_an_imported_set_is_replaced(tmp_path: Path) -> None:
    """OUT without its last part, OUT equal to SRC, around or in it; sets that hold more than an import makes."""
    source = rar_file(tmp_path / "rar.jsonl")
    for split in ("train", "validation"):
        import_tokens(source, tmp_path / "tk/in100" / split, META)
    import_tokens(source, tmp_path / "tk/in100/train", META)  # ours: made again
    llamagen(tmp_path / "codes", 0)
    import_tokens(source, tmp_path / "tokenized", META)
    (tmp_path / "tokenized/tokenize.json").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for given, out, message in [
        (source, "tk/in100", "holds train, which is no part of a token set"),
        (source, "tk", "holds in100"),
        (source, "tokenized", r"holds tokenize\.json"),
        (source, ".", "they are one, or one lies in the other"),
        (source, "rar.jsonl", "they are one"),
        (tmp_path / "codes", "codes", "they are one"),
        (tmp_path / "codes", "codes/imagenet256_codes", "one lies in the other"),
        (tmp_path / "codes", "codes/new", "one lies in the other"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            import_tokens(given, tmp_path / out, META)
        assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

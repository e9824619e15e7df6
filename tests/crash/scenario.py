"""What a run does with its files, small: the same calls, some bytes each, no torch.

It goes on from whatever it finds, as every verb does, so that a second call after any crash must
end in the bytes of a run that nothing disturbed.
"""

from pathlib import Path

from selectune.files import is_complete, lock, open_dir, staged, sweep, write_file

KIND = "crash-test"
PAYLOAD_BYTES = 6000


def scenario(root: Path, generation: int) -> None:
    with lock(root):
        sweep(root)
        if not _is_done(root / "result", generation):
            with staged(root / "result", kind=KIND, meta={"generation": generation}) as stage:
                stage.write_json("facts.json", {"generation": generation})
                stage.write_bytes("deep/payload.bin", payload(generation))
                (stage.path / "foreign.txt").write_text(f"{generation}")
        # Last: nothing after it syncs `root` by chance, where the name of `parts` stands.
        write_file(root / "parts" / "single.txt", payload(generation))


def payload(generation: int) -> bytes:
    return bytes([48 + generation]) * PAYLOAD_BYTES


def observe(root: Path) -> tuple[int, int]:
    """Return the generation of the result and that of the single file.

    Zero means none. Anything between two generations fails here.
    """
    result = 0
    if is_complete(root / "result", kind=KIND):
        opened = open_dir(root / "result", kind=KIND)
        result = opened.meta["generation"]
        assert opened.read_json("facts.json") == {"generation": result}
        assert opened.read_bytes("deep/payload.bin") == payload(result)
        assert opened.read_text("foreign.txt") == str(result)
    single = 0
    if (root / "parts" / "single.txt").exists():
        data = (root / "parts" / "single.txt").read_bytes()
        single = data[0] - 48
        assert data == payload(single)
    return result, single


def tree(root: Path) -> dict[str, bytes]:
    """Return every file under `root`; the lock names a process and is left out."""
    return {
        p.relative_to(root).as_posix(): p.read_bytes() if p.is_file() else b""
        for p in sorted(root.rglob("*"))
        if p.name != ".lock"
    }


def _is_done(path: Path, generation: int) -> bool:
    if not is_complete(path, kind=KIND):
        return False
    return open_dir(path, kind=KIND).meta["generation"] == generation

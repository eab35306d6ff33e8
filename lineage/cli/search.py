"""`lineage search`: pictures that fit words, by a run of CLIP."""

from __future__ import annotations

from pathlib import Path

from lineage.characters import plain
from lineage.cli.arguments import Flag, PathName, RunName, SheetCount, Threads, print_json
from lineage.cli.imports import large_imports
from lineage.errors import UserError, say


def search(
    run: RunName,
    data: str,
    words: list[str],
    /,
    *,
    out: PathName | None = None,
    count: SheetCount = 16,
    split: str = "test",
    json: Flag = False,
    device: str = "auto",
    threads: Threads | None = None,
) -> None:
    """Find the pictures that fit words best, by a run of CLIP.

    For a single picture, say instead how well each of the words fits.

    Args:
        run: Run folder of clip, or pretrained:clip.
        data: Folder of pictures, with captions or without; spec of a data set; or one picture.
        words: One query or several.
        out: Sheet of the pictures to write.
        count: Number of pictures of each query.
        split: Split of a data set; a folder has none.
        json: If true, print one JSON document.
        device: cpu, cuda, mps or auto.
        threads: Number of threads on a CPU; as many as are free if left out.
    """
    with large_imports():
        from lineage import runs, search
        from lineage.cli.drawing import pixels
        from lineage.data.records import is_picture
        from lineage.notes import unread_text
        from lineage.sheets import check_picture, save_picture
        from lineage.threads import use_threads
        from lineage.training.store import fingerprint
    if out is not None:
        check_picture(out)
    with use_threads(threads):
        model = runs.load_comparer(run, device)
        for note in unread_text(model.text, words):
            say(plain(note))
        path = Path(data).expanduser()
        if path.is_file() and is_picture(str(path)):
            if out is not None:
                raise UserError(f"--out has no effect for the single picture {path}: leave it out.")
            ranked = search.choose(model, pixels(path, model.size), words)
            if json:
                print_json([{"words": one, "cosine": cosine} for one, cosine in ranked])
            else:
                print("\n".join(f"{cosine:.3f}  {plain(one)}" for one, cosine in ranked))
            return
        pictures = search.pictures_in(data, split, model.size)
        weights = fingerprint((run / "model.safetensors").read_bytes())
        vectors = search.embeddings(model, pictures, weights)
        hits = search.search(model, vectors, pictures.names, words, count)
        if out is not None:
            save_picture(search.search_sheet(pictures, words, hits), out)
    if json:
        print_json({w: [hit._asdict() for hit in row] for w, row in zip(words, hits, strict=True)})
        return
    for query, row in zip(words, hits, strict=True):
        print(plain(query))
        print("\n".join(f"  {hit.cosine:.3f}  {plain(hit.name)}" for hit in row))
    if out is not None:
        print(plain(out))

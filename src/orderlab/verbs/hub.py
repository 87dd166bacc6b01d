"""Verbs of weights: hub import, hub export, hub push."""

from __future__ import annotations

from pathlib import Path

from orderlab.verbs.output import Count, print_json


def hub_import(
    file: Path,
    out: Path | None = None,
    /,
    heads: Count | None = None,
    grid: str | None = None,
    classes: Count | None = None,
    json: bool = False,
) -> None:
    """LlamaGen's checkpoint (c2i_B_256.pt) as safetensors with its config, bit for bit.

    Args:
        file: LlamaGen's .pt or .safetensors, or ours; FILE#ema takes the averaged weights of a training file that holds both
        out: .safetensors file to write; FILE's name with that suffix when empty
        heads: attention heads, where the sizes match no LlamaGen preset
        grid: HEIGHTxWIDTH of the tokens, where it is not the preset's
        classes: how many, where the class table has no row for the null class of guidance
        json: print for programs
    """
    from orderlab.hub import import_weights
    from orderlab.order.paths import parse_grid

    result = import_weights(file, out, heads, parse_grid(grid) if grid else None, classes)
    if json:
        print_json(result)
        return
    config = result["config"]
    print(f"{result['file']}: {result['parameters']:,} parameters, {config['layers']} layers of width {config['dim']}")
    print(f"  grid     {config['grid'][0]}x{config['grid'][1]} tokens of {config['vocabulary']:,} codes; --grid HEIGHTxWIDTH for another")
    null = (
        f"row {config['classes']} is the null class of guidance"
        if config["has_null_class"]
        else "none of them is a null class: no guidance"
    )
    print(f"  classes  {config['classes']}: the class table has {result['class_rows']} rows, {null}; --classes N for another number")
    if result["dropped"]:
        print(f"dropped, no weights: {len(result['dropped'])} entries ({result['dropped'][0]}, ...)")


def hub_export(
    run: Path, out: Path, /, format: str = "safetensors", merge_target: str | None = None, checkpoint: str = "final", json: bool = False
) -> None:
    """A run as a folder to share: weights, config, metrics and a model card with its rows.

    Args:
        run: the run folder
        out: folder to write
        format: safetensors (ours) or llamagen (what its samplers read)
        merge_target: merge the target table into the inputs for this order, as RAR's authors export
        checkpoint: final, final-ema, random-end or anneal-end
        json: print for programs
    """
    from orderlab.hub import export_run

    done = export_run(run, out, format, merge_target, checkpoint)
    if json:
        print_json({"files": [str(file) for file in done.files], "notes": done.notes})
        return
    for line in (*map(str, done.files), *(f"note: {note}" for note in done.notes)):
        print(line)


def hub_push(folder: Path, repository: str, /, private: bool = False) -> None:
    """Upload an exported folder to the Hugging Face Hub (needs the extra [hub]).

    Args:
        folder: what hub export wrote
        repository: OWNER/NAME
        private: make the repository private
    """
    from orderlab.hub import push

    print(push(folder, repository, private))

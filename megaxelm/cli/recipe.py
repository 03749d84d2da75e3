"""`megaxelm recipe`."""

from __future__ import annotations

import typer

from megaxelm.cli.options import RecipeArgument, SetOption
from megaxelm.recipe import dump_recipe, load_recipe, recipe_docs

app = typer.Typer(no_args_is_help=True, help="Look at recipes.")


@app.command("show")
def recipe_show(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Print the resolved recipe, every default written out."""
    print(dump_recipe(load_recipe(recipe, overrides or ())), end="")


@app.command("check")
def recipe_check(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Check a recipe without running it, and print what it would train."""
    from megaxelm.train.ds_config import check_ds_config, find_ds_config
    from megaxelm.train.members import account_text, expected_members

    loaded = load_recipe(recipe, overrides or ())
    check_ds_config(find_ds_config(loaded.train.deepspeed_config), loaded.train)
    print(f"{recipe}: valid")
    k = loaded.clusters.num_clusters or (len(loaded.corpus.languages) if loaded.corpus.languages else None)
    if k is None:
        print("one expert a language; how many there are is known when the corpus has been read")
    else:
        print(account_text(expected_members(loaded, [f"cluster-{number}" for number in range(k)])))


@app.command("docs")
def recipe_docs_command() -> None:
    """Print the reference of all fields (docs/recipe.md)."""
    print(recipe_docs(), end="")

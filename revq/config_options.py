"""Configuration dataclasses as options of the command line: their help, and the values of the recipes."""

import ast
import dataclasses
import inspect
import itertools
from typing import Any, TypedDict, get_type_hints


def options(recipes: dict[str, Any]) -> type:
    """The fields of a configuration dataclass as options without defaults, for `revq train`.

    The result is a `TypedDict` of which every key is optional: parsing gives a dictionary of the options that the user
    gave and leaves out the others, which the recipe supplies.  The recipe is known only after parsing.

    Args:
        recipes: the configuration in each recipe, by the recipe's name.  An option's help is the docstring of its field
            followed by its values in the recipes.
    """
    config = type(next(iter(recipes.values())))
    types, docs = get_type_hints(config), _field_docs(config)
    fields: dict[str, Any] = {}
    help_lines = []
    for name in [item.name for item in dataclasses.fields(config)]:
        values = {recipe: getattr(value, name) for recipe, value in recipes.items()}
        if dataclasses.is_dataclass(types[name]):
            fields[name], default = options(values), ""
        elif len(set(values.values())) == 1:
            fields[name], default = types[name], f"  All recipes: {next(iter(values.values()))}."
        else:
            texts = (f"{recipe} {value}" for recipe, value in values.items())
            fields[name], default = types[name], f"  Recipes: {', '.join(texts)}."
        help_lines.append(f"    {name}: {docs.get(name, '')}{default}")
    made = TypedDict(f"{config.__name__}Options", fields, total=False)  # type: ignore[misc]  # made at run time
    made.__doc__ = "\n".join([inspect.getdoc(config) or "", "", "Attributes:", *help_lines])
    return made


def _field_docs(config: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, on one line; Python does not keep them at run time."""
    try:
        source = ast.parse(inspect.getsource(config)).body[0]
    except OSError:  # installed without source files
        return {}
    assert isinstance(source, ast.ClassDef)
    return {
        field.target.id: " ".join(doc.value.value.split())
        for field, doc in itertools.pairwise(source.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str)
    }


def override(config: Any, given: dict[str, Any]) -> Any:
    """``config`` with the values of ``given``, which holds a dictionary for a nested configuration."""
    fields = {k: override(getattr(config, k), v) if isinstance(v, dict) else v for k, v in given.items()}
    return dataclasses.replace(config, **fields)

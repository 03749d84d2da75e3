"""The one configuration of a run: YAML in, strict pydantic models out. `load_recipe(path, overrides)` is the entry."""

from megaxelm.recipe.clusters import ClustersConfig, TfidfConfig, TypologyConfig
from megaxelm.recipe.corpus import (
    CatalogSource,
    CorpusConfig,
    ExecutorConfig,
    FieldNames,
    FileSource,
    HeldOutConfig,
    HuggingFaceSource,
    MinhashConfig,
    SlurmConfig,
    Source,
    TokenizerConfig,
)
from megaxelm.recipe.load import dump_recipe, load_recipe, override_tree, parse_recipe
from megaxelm.recipe.mixture import EnsembleConfig, EvaluationConfig, RouterName
from megaxelm.recipe.reference import recipe_docs
from megaxelm.recipe.rounds import RoundConfig, round_steps
from megaxelm.recipe.schema import (
    ExpertsConfig,
    ExportConfig,
    LoraConfig,
    ModelConfig,
    Recipe,
    SeedConfig,
    TrainConfig,
)
from megaxelm.recipe.section import Section, result_settings

__all__ = [
    "CatalogSource",
    "ClustersConfig",
    "CorpusConfig",
    "EnsembleConfig",
    "EvaluationConfig",
    "ExecutorConfig",
    "ExpertsConfig",
    "ExportConfig",
    "FieldNames",
    "FileSource",
    "HeldOutConfig",
    "HuggingFaceSource",
    "LoraConfig",
    "MinhashConfig",
    "ModelConfig",
    "Recipe",
    "RoundConfig",
    "RouterName",
    "Section",
    "SeedConfig",
    "SlurmConfig",
    "Source",
    "TfidfConfig",
    "TokenizerConfig",
    "TrainConfig",
    "TypologyConfig",
    "dump_recipe",
    "load_recipe",
    "override_tree",
    "parse_recipe",
    "recipe_docs",
    "result_settings",
    "round_steps",
]

"""Hydra's search path: conf/, then the presets of installed families."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from llmtrain.models.registry import preset_folders


class FamilyPresets(SearchPathPlugin):
    """Append the folders of `preset_folders`; a preset of conf/ with the same name is found first."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in preset_folders():
            search_path.append("llmtrain.families", f"file://{folder}")


def extend() -> None:
    """Add the presets to every configuration that Hydra composes in this process from now on.

    Unlike `hydra.searchpath=…`, this leaves that key to the user. Raise ConfigError for a family that cannot
    be loaded.
    """
    preset_folders()
    Plugins.instance().register(FamilyPresets)

"""Where images come from: the contract, the registry, and one module per source."""

from collections.abc import Collection

from pipeline.sources.contract import Example, Source, list_split, listing
from pipeline.sources.map_files import MAP_KEYS, with_maps
from stages.errors import ConfigError
from stages.options import ImageOptions, SourceOptions
from stages.registry import import_named

__all__ = ["SOURCES", "Example", "Source", "list_split", "listing", "open_source"]

SOURCES = {
    "scenes": "pipeline.sources.scenes:Scenes",
    "fashion-mnist": "pipeline.sources.fashion_mnist:FashionMnist",
    "image-folder": "pipeline.sources.image_folder:ImageFolder",
    "parquet": "pipeline.sources.parquet_files:ParquetFiles",
}
WITH_MAPS = ("image-folder", "parquet")


def open_source(options: SourceOptions, images: ImageOptions, maps: Collection[str] = ()) -> Source:
    """The source of that name, or at that `package.module:Class`.

    Args:
        options: names it.
        images: their size.
        maps: names of the maps that are needed. Others that the options have are not read, and change nothing.

    Raises:
        ConfigError: no such source, or one that its options do not fit.
    """
    if options.name in SOURCES and options.name not in WITH_MAPS:
        for key in MAP_KEYS:
            if getattr(options, key):
                raise ConfigError(
                    f"source.{key} is {list(getattr(options, key))}, but only {' and '.join(WITH_MAPS)} read maps. Leave it out."
                )
    return import_named("source.name", options.name, SOURCES)(with_maps(options, maps), images)

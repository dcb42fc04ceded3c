"""Where images come from: the contract, the registry, and one module per source."""

import importlib

from pipeline.sources.contract import Example, Source, listing
from stages.errors import ConfigError
from stages.options import ImageOptions, SourceOptions

__all__ = ["SOURCES", "Example", "Source", "listing", "open_source"]

SOURCES = {
    "scenes": "pipeline.sources.scenes:Scenes",
    "fashion-mnist": "pipeline.sources.fashion_mnist:FashionMnist",
    "image-folder": "pipeline.sources.image_folder:ImageFolder",
    "parquet": "pipeline.sources.parquet_files:ParquetFiles",
}


def open_source(options: SourceOptions, images: ImageOptions) -> Source:
    """The source of that name, or at that `package.module:Class`.

    Raises:
        ConfigError: no such source, or one that its options do not fit.
    """
    module, colon, attribute = SOURCES.get(options.name, options.name).partition(":")
    if not colon:
        raise ConfigError(
            f"source.name is {options.name}, but it must be one of: {', '.join(sorted(SOURCES))}; "
            f"or package.module:Class. Choose one."
        )
    try:
        source_class = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"source.name is {options.name}, but it cannot be imported ({error}). Correct the name, or the Python path."
        ) from error
    return source_class(options, images)

"""Condition maps that sources keep beside their images: of labels (ids), or of numbers in [0, 1]."""

import dataclasses
import io
import logging
import posixpath
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline import storage
from pipeline.code_dataset.parts import OWN_COLUMNS
from pipeline.images import decode_image, decode_label_map, decode_number_map
from pipeline.sources.contract import IMAGE, Example
from stages.errors import BadImage, ConfigError
from stages.options import SourceOptions

logger = logging.getLogger(__name__)

MAP_KEYS = ("label_maps", "number_maps", "holdout_maps")  # lists of NAME=PATH
LOWER_SUFFIXES = (".png", ".npy", ".tif", ".tiff", ".bmp")
MAP_SUFFIXES = (*LOWER_SUFFIXES, *map(str.upper, LOWER_SUFFIXES))


def with_maps(options: SourceOptions, names: Collection[str]) -> SourceOptions:
    """The options with these maps only."""
    labels, numbers, holdout = (
        tuple(entry for entry in getattr(options, key) if entry.partition("=")[0] in names) for key in MAP_KEYS
    )
    return dataclasses.replace(options, label_maps=labels, number_maps=numbers, holdout_maps=holdout)


def map_names(options: SourceOptions) -> tuple[str, ...]:
    """Names of all maps, those of labels first.

    Raises:
        ConfigError: a name that is given twice, or is that of the image; or that is free to choose, and is a column of code datasets.
    """
    names: list[str] = []
    for key in ("label_maps", "number_maps"):
        for entry in getattr(options, key):
            name, equals, _ = entry.partition("=")
            if name in ("", IMAGE, *names):
                raise ConfigError(
                    f"source.{key} names {entry}, but every map has a name of its own, which is not {IMAGE}. Write another name."
                )
            if equals and name in OWN_COLUMNS:  # without a folder it is a column of files that may be another's
                raise ConfigError(f"source.{key} names {entry}, but {name} is a column of every code dataset. Write another name.")
            names.append(name)
    return tuple(names)


def check_map_names(options: SourceOptions, stored: Sequence[str]) -> None:
    """Refuses maps, those to store (`codes.conditions`) and those that the source has, whose names cannot be told apart.

    Raises:
        ConfigError: what `map_names` raises; or a map to store is named twice, or like a column that is there anyway.
    """
    map_names(options)
    for name in stored:
        if name in OWN_COLUMNS or stored.count(name) > 1:
            rule = f"{name} is a column of every code dataset" if name in OWN_COLUMNS else f"it names {name} more than once"
            raise ConfigError(f"codes.conditions is {list(stored)}, but {rule}. Name every map once, and like no other column.")


def pack(image: bytes, maps: Mapping[str, bytes | None]) -> bytes:
    """An image and the maps it has as one ZIP archive, the same for the same content; its own bytes where the source has no maps."""
    if not maps:
        return image
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in {IMAGE: image, **maps}.items():
            if data is not None:
                archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def decode_packed(data: bytes, options: SourceOptions) -> Example:
    """The image and the maps of `pack`; one that it does not have is missing here, too.

    Raises:
        BadImage: one of them cannot be decoded, or a map is of another size than the image (unfit-map).
    """
    names = map_names(options)
    if not names:
        return Example(decode_image(data))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    image, conditions = decode_image(files.pop(IMAGE)), {}
    for name, file in files.items():
        conditions[name] = _decode_map(name, file, is_labels=names.index(name) < len(options.label_maps))
        if conditions[name].shape != image.shape[:2]:
            sizes = ["{1} x {0}".format(*array.shape) for array in (conditions[name], image)]
            raise BadImage("unfit-map", f"{name} has {sizes[0]} pixels and the image {sizes[1]}")
    return Example(image, conditions)


def _decode_map(name: str, data: bytes, is_labels: bool) -> np.ndarray:
    try:
        return decode_label_map(data) if is_labels else decode_number_map(data)
    except BadImage as error:
        raise BadImage(error.kind, f"{name}: {error.message}") from error


@dataclass
class MapFolder:
    """The files of one map: for the image `a/b.jpg` below its root, `a/b.png` or another of MAP_SUFFIXES below the folder. Images outside
    their root have none."""

    name: str
    folder: str
    _suffix: str = field(default=MAP_SUFFIXES[0], repr=False)

    def read(self, relative: str) -> bytes | None:
        """The file for an image at a path relative to its root, if there is one."""
        stem = _stem(relative)
        if stem.startswith(("/", "../", storage.S3)):
            return None
        for suffix in dict.fromkeys((self._suffix, *MAP_SUFFIXES)):
            try:
                data = storage.read_bytes(storage.join(self.folder, stem + suffix))
            except FileNotFoundError:
                continue
            self._suffix = suffix  # of the next one, most likely
            return data
        return None

    def sizes(self) -> dict[str, int | None]:
        """Bytes of every file, by its path relative to the folder and without suffix. ConfigError when two differ in their suffix only."""
        sizes: dict[str, int | None] = {}
        for path, size in storage.list_sizes(self.folder, follow_links=True).items():
            stem = _stem(path.removeprefix(self.folder + "/"))
            if not path.endswith(MAP_SUFFIXES):
                continue
            if stem in sizes:
                raise ConfigError(
                    f"The {self.name} of images is in {self.folder}, but more than one file there is that of {stem}, such as {path}. "
                    f"Keep one."
                )
            sizes[stem] = size
        return sizes


def _stem(relative: str) -> str:
    return posixpath.splitext(relative if relative.startswith(storage.S3) else posixpath.normpath(relative))[0]


def map_folders(options: SourceOptions, is_holdout: bool) -> list[MapFolder]:
    """Where the maps of image files lie, in order of `map_names`.

    Raises:
        ConfigError: an entry without a folder, or a folder for an unknown map.
    """
    names = map_names(options)
    folders: dict[str, str] = {}
    for key in MAP_KEYS if is_holdout else MAP_KEYS[:2]:
        entries = getattr(options, key)
        for entry in entries:
            name, _, folder = entry.partition("=")
            if not folder:
                raise ConfigError(f"source.{key} names {entry}, but maps of image files lie in folders. Write {name}=FOLDER.")
            if name not in names:
                raise ConfigError(f"source.{key} names {name}, but the maps are {', '.join(names) or 'none'}. Name one of these.")
            if sum(other.startswith(f"{name}=") for other in entries) > 1:
                raise ConfigError(f"source.{key} names {name} more than once, but a map has one folder. Keep one.")
            folders[name] = storage.absolute(folder)
    return [MapFolder(name, folders[name]) for name in names]


def map_columns(options: SourceOptions) -> tuple[str, ...]:
    """Columns of maps in Parquet files, in order of `map_names`.

    Raises:
        ConfigError: an entry names a folder.
    """
    for key in MAP_KEYS:
        for entry in getattr(options, key):
            if "=" in entry or key == "holdout_maps":
                raise ConfigError(
                    f"source.{key} names {entry}, but maps in Parquet files are columns. Name the column in label_maps or number_maps."
                )
    return map_names(options)


def map_sizes(folders: Sequence[MapFolder], relative_paths: Sequence[str]) -> list[str]:
    """Bytes of the maps of each image, such as `segmentation:512 depth:1024`, which change when a map does; `-` where there is none.

    How many images have no map is logged, with one of them: what needs the map leaves these out.

    Raises:
        ConfigError: no image has a certain map.
    """
    texts = [""] * len(relative_paths)
    for folder in folders:
        sizes = folder.sizes()
        found = [sizes.get(_stem(path)) for path in relative_paths]
        missing = [path for path, size in zip(relative_paths, found) if size is None]
        expected = f"{_stem(missing[0])}{MAP_SUFFIXES[0]} for {missing[0]}" if missing else ""
        if missing and len(missing) == len(found):
            raise ConfigError(
                f"The {folder.name} of images is in {folder.folder}, but no image has one there: the first would be {expected}. Name the "
                f"folder with the same paths below it as the images have."
            )
        if missing:
            logger.warning("%d of %d images have no %s in %s, such as %s", len(missing), len(found), folder.name, folder.folder, expected)
        texts = [f"{text} {folder.name}:{'-' if size is None else size}".strip() for text, size in zip(texts, found)]
    return texts

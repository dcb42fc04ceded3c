"""Image files: one folder per class, one flat folder, or a list file. Local or s3://."""

import functools
import logging
import os
import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.images import SUFFIXES
from pipeline.sources.contract import Example, Split, check_listing, hashed_id, listing, split_by_hash, split_path
from pipeline.sources.map_files import decode_packed, map_folders, map_sizes, pack
from stages.errors import ConfigError
from stages.options import ImageOptions, SourceOptions

logger = logging.getLogger(__name__)

LIST_SUFFIXES = (".txt", ".tsv", ".lst")
COMMENT = "#"
MACOS_FOLDER = "__MACOSX"  # of the archives that macOS makes
HIDDEN = "hidden"
# Pictures that people take for images, too, and that no decoder here knows.
UNREADABLE = (
    ".avif", ".heic", ".heif", ".jxl", ".svg", ".psd", ".tga", ".exr", ".hdr", ".ico", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw"
)
NUM_SUFFIXES = 8  # named in a message at most

Entry = tuple[str, str]  # path, class name or ""


class ImageFolder:
    """Images below `source.path`.

    A folder with subfolders gives one class per subfolder, in order of name; a flat folder gives none. Hidden files and what is in
    hidden folders (names that begin with a dot, and the __MACOSX of archives) do not count. A list file has one path per line, relative
    to the file, and after a tab optionally the class name; lines that begin with # are comments. An image's id is a hash of its
    path relative to the root, and images are listed in order of id, so that the first `num_images` are a fair sample. The listing
    has the sizes of the files (but not of those that a list on S3 names), so that a file which changed is noticed if its size did.
    Maps lie in folders of their own under the same relative paths; their sizes are the entity tags of the listing.
    """

    def __init__(self, options: SourceOptions, images: ImageOptions):
        if not options.path:
            raise ConfigError("source.path is not set, but image-folder reads files. Name a folder or a list file.")
        self.options = options
        root, holdout_root = _root_folder(options.path), _root_folder(options.holdout_path or options.path)
        if options.holdout_maps and root == holdout_root:
            raise ConfigError(
                f"source.holdout_maps is {list(options.holdout_maps)}, but held-out images lie in {root}, as the others do. Name the "
                f"folders of all maps by label_maps and number_maps."
            )
        self._maps = {root: map_folders(options, is_holdout=False), holdout_root: map_folders(options, is_holdout=root != holdout_root)}
        for path in (options.path, options.holdout_path or options.path):
            for each in self._maps[_root_folder(path)]:
                if not _is_list(path) and f"{each.folder}/".startswith(f"{_root_folder(path)}/"):
                    raise ConfigError(
                        f"The {each.name} of images is in {each.folder}, but that is within {path}, where every file counts as an image. "
                        f"Move the maps beside it, or name the images by a list file."
                    )

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """Those of the training images. Who only reads images need not list them for it."""
        return _class_names(_entries("source.path", str(self.options.path)))

    def list_images(self, split: Split) -> pa.Table:
        key, path = split_path(self.options, split)
        table = check_listing(split_by_hash(self._table(key, str(path)), self.options, split), self.options, split)
        root = _root_folder(str(path))
        if not self._maps[root]:
            return table
        tags = map_sizes(self._maps[root], [_relative(uri, root) for uri in table["uri"].to_pylist()])
        return table.set_column(table.schema.get_field_index("etag"), "etag", pa.array(tags, pa.string()))

    def _table(self, key: str, path: str) -> pa.Table:
        root = _root_folder(path)
        is_list = _is_list(path)
        sizes = {} if is_list else storage.list_sizes(root, follow_links=True)
        entries = _entries(key, path, sizes)
        if path == self.options.path:
            self.class_names = _class_names(entries)  # a store is slow to list again
        if is_list:
            sizes = {image: os.path.getsize(image) for image, _ in entries if os.path.isfile(image)}
        numbers = {name: i for i, name in enumerate(self.class_names)}
        unknown = {name for _, name in entries} - set(self.class_names or ("",))
        if unknown:
            raise ConfigError(
                f"{key} is {path}, but its class {min(unknown) or '(none)'} is not one of the training images' classes "
                f"({', '.join(self.class_names) or 'none'}). Use the same classes in both."
            )
        ids = np.array([hashed_id(_relative(image, root)) for image, _ in entries], dtype=np.int64)
        order = np.argsort(ids, kind="stable")
        labels = np.array([numbers[name] for _, name in entries], np.int32)[order] if self.class_names else None
        images = [entries[i][0] for i in order]
        return listing(ids[order], images, labels, [sizes.get(image) for image in images])

    def fetch(self, uri: str) -> bytes:
        # The longest root, since one split may lie within the other.
        root = max((root for root in self._maps if uri.startswith(root + "/")), key=len, default=_root_folder(str(self.options.path)))
        maps = {folder.name: folder.read(_relative(uri, root)) for folder in self._maps[root]}
        return pack(storage.read_bytes(uri), maps)

    def decode(self, data: bytes) -> Example:
        return decode_packed(data, self.options)


def _is_list(path: str) -> bool:
    return path.endswith(LIST_SUFFIXES)


def _root_folder(path: str) -> str:
    return posixpath.dirname(storage.absolute(path)) if _is_list(path) else storage.absolute(path)


def _relative(path: str, root: str) -> str:
    """The path below the root; the whole path of an image that lies elsewhere."""
    return path.removeprefix(root + "/")


def _entries(key: str, path: str, files: Iterable[str] | None = None) -> list[Entry]:
    """Entries of a list file, or of a folder with these files; it is listed if they are not given."""
    if _is_list(path):
        return _list_file_entries(key, path)
    return _folder_entries(key, path, storage.list_files(_root_folder(path), follow_links=True) if files is None else files)


def _class_names(entries: Iterable[Entry]) -> tuple[str, ...]:
    return tuple(sorted({name for _, name in entries if name}))


def _folder_entries(key: str, path: str, files: Iterable[str]) -> list[Entry]:
    root = _root_folder(path)
    images: list[str] = []
    others: dict[str, list[str]] = defaultdict(list)
    for file in files:
        kind = _kind(_relative(file, root))
        (images if kind in SUFFIXES else others[kind]).append(file)
    _log_others(key, path, others)
    if not images:
        raise ConfigError(
            f"{key} is {path}, but there are no images in it ({', '.join(SUFFIXES)}). Name a place with images."
        )
    names = [posixpath.dirname(_relative(image, root)).split("/")[0] for image in images]
    if "" in names and any(names):
        stray = images[names.index("")]
        raise ConfigError(f"{key} is {path}, which has class folders, but {stray} lies beside them. Move it into one.")
    return list(zip(images, names))


def _kind(relative: str) -> str:
    """The suffix of a file in lower case, or HIDDEN."""
    is_hidden = any(part.startswith(".") or part == MACOS_FOLDER for part in relative.split("/"))
    return HIDDEN if is_hidden else posixpath.splitext(relative)[1].lower()


def _log_others(key: str, path: str, others: dict[str, list[str]]) -> None:
    """Says which files of a folder are passed over, by kind."""
    pictures = {kind: files for kind, files in others.items() if kind in UNREADABLE}
    companions = {kind: files for kind, files in others.items() if kind not in UNREADABLE}
    if pictures:
        logger.warning("%s is %s, where pictures that cannot be read are passed over: %s. Convert them", key, path, _count(pictures))
    if companions:
        logger.info("%s is %s, where files that are no images are passed over: %s", key, path, _count(companions))


def _count(others: dict[str, list[str]]) -> str:
    """The most frequent kinds of files, with how many there are of each, and an example."""
    counts = Counter({kind: len(files) for kind, files in others.items()}).most_common()
    texts = [f"{count} {kind or 'without a suffix'}" for kind, count in counts[:NUM_SUFFIXES]]
    if rest := sum(count for _, count in counts[NUM_SUFFIXES:]):
        texts.append(f"{rest} others")
    return f"{', '.join(texts)}, such as {others[counts[0][0]][0]!r}"


def _list_file_entries(key: str, path: str) -> list[Entry]:
    try:
        lines = storage.read_bytes(path).decode("utf-8-sig").splitlines()
    except FileNotFoundError:
        raise ConfigError(f"{key} is {path}, but there is no such list file. Name an existing one.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key} is {path}, but it is not UTF-8 text ({error}). Write one path per line.") from error
    root = _root_folder(path)
    entries = []
    for line in filter(None, map(str.strip, lines)):
        if line.startswith(COMMENT):
            continue
        name, _, label = line.partition("\t")
        storage.check_address(f"A line of {path}", name)
        entries.append((_listed_image(name, root), label.strip()))
    if not entries:
        raise ConfigError(f"{key} is {path}, but the list is empty. Write one path per line.")
    if any(label for _, label in entries) and not all(label for _, label in entries):
        raise ConfigError(f"{key} is {path}, but only some of its lines name a class. Label all or none.")
    first = entries[0][0]
    if storage.is_local(path) and storage.is_local(first) and not os.path.exists(first):
        raise ConfigError(
            f"{key} is {path}, but the first file that it names, {first!r}, does not exist. Write one path per line, relative to the list, "
            f"and after a tab optionally a class."
        )
    return entries


def _listed_image(name: str, root: str) -> str:
    """The path of an image of a list file: one spelling for each local file, since its id is a hash of it. Keys in a store are literal."""
    is_absolute = name.startswith(("/", storage.S3))
    is_key = (name if is_absolute else root).startswith(storage.S3)
    name = name if is_key else posixpath.normpath(name)
    return name if is_absolute else storage.join(root, name)

"""Models of Hugging Face's transformers in directories: read, written, and given plain text.

A directory holds config.json, safetensors and the files of a tokenizer. Transformers is imported
when such a directory is met; it is told to fetch nothing, to run no code from the directory and to
read no pickle.
"""

import copy
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from rankfold.errors import CalibrationError, ModelError
from rankfold.files import replace_file
from rankfold.without_weights import without_weights

Pathlike = str | os.PathLike[str]

CONFIG, GENERATION, CARD = "config.json", "generation_config.json", "README.md"
_TOKENIZER_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".bpe"}
_NO_TOKENIZER = {CONFIG, GENERATION, "plan.json"}


def is_pretrained(directory: Pathlike) -> bool:
    """Whether it is a directory with the configuration of a model."""
    return (Path(directory) / CONFIG).is_file()


def load_pretrained(directory: Pathlike) -> nn.Module:
    """The model of a directory, in eval mode and in the dtype of its file.

    Of the class that its configuration names under `architectures`. Raises ModelError, saying what
    is wrong, if transformers is not installed or cannot read it.
    """
    kind, _ = _kind_and_config(directory)
    try:
        with _no_bars():
            model, about = kind.from_pretrained(
                str(directory),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype="auto",
                output_loading_info=True,
            )
    except Exception as error:
        raise ModelError(f"{directory}: {type(error).__name__}: {_first_line(error)}") from error
    if missing := sorted(about["missing_keys"]):  # which would be random numbers
        saved = "; it is of a factorized model" if (Path(directory) / "plan.json").is_file() else ""
        raise ModelError(
            f"{directory}: its weights lack '{missing[0]}' ({len(missing)} in all){saved}"
        )
    return model.eval()


def build_pretrained(directory: Pathlike) -> nn.Module:
    """The same with any weights: from its configuration alone."""
    kind, config = _kind_and_config(directory)
    try:
        with _default_dtype(getattr(config, "dtype", None)):
            return kind(config).eval()
    except Exception as error:
        raise ModelError(f"{directory}: {type(error).__name__}: {_first_line(error)}") from error


def empty_pretrained(directory: Pathlike) -> nn.Module:
    """The same with its parameters on the meta device and its buffers where they are computed."""
    with without_weights():
        return build_pretrained(directory)


def is_of_transformers(model: nn.Module) -> bool:
    """Whether it is a model of transformers."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def write_files(model: nn.Module, directory: Pathlike, card: str) -> None:
    """Write what else than weights belongs to a model of transformers; nothing for other models.

    That is its configuration, that of its `generate`, its card, and the files of the tokenizer that
    are in the directory that it came from. Each file is replaced at once.
    """
    if not is_of_transformers(model):
        return
    target = Path(directory)

    def put(name: str, text: str) -> None:
        replace_file(target / name, lambda path: path.write_text(text, encoding="utf-8"))

    about: Any = copy.deepcopy(cast(Any, model).config)
    about.architectures, about.dtype = [type(model).__name__], cast(Any, model).dtype
    put(CONFIG, about.to_json_string())
    put(CARD, card)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        put(GENERATION, generation.to_json_string())
    source = Path(str(getattr(model, "name_or_path", "") or ""))
    if source != Path() and source.is_dir() and source.resolve() != target.resolve():
        for file in _tokenizer_files(source):
            replace_file(target / file.name, partial(shutil.copyfile, file))


def text_batches(
    directory: Pathlike, file: Pathlike, *, length: int = 128, size: int = 8
) -> list[dict[str, torch.Tensor]]:
    """A plain text file as batches of `size` token sequences for the model of a directory.

    Where the tokenizer has a token to pad with, each line that is not empty is a sequence, cut at
    `length` tokens. Where it has none, as those of language models, the whole text is cut into
    sequences of `length`. Raises CalibrationError for a text that is missing or too short, or a
    directory without a tokenizer.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"the text {file} cannot be read: {error}") from error
    tokenizer: Any = _tokenizer(directory)
    _, config = _kind_and_config(directory)
    positions = getattr(config, "max_position_embeddings", None) or length
    length = min(length, positions, tokenizer.model_max_length)
    if tokenizer.pad_token is None:
        ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
        whole = ids[: len(ids) // length * length].reshape(-1, length)
        found = [{"input_ids": rows} for rows in whole.split(size)] if len(whole) else []
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        found = [
            dict(
                tokenizer(
                    lines[start : start + size],
                    padding=True,
                    truncation=True,
                    max_length=length,
                    return_tensors="pt",
                )
            )
            for start in range(0, len(lines), size)
        ]
    if not found:
        raise CalibrationError(f"the text {file} is too short: it makes no sequence of tokens")
    return found


def _kind_and_config(directory: Pathlike) -> tuple[Any, Any]:
    """The class of the model in a directory, and its configuration."""
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
        if not config.architectures:
            return transformers.AutoModel._model_mapping[type(config)], config
    except Exception as error:
        raise ModelError(f"{Path(directory) / CONFIG}: {_first_line(error)}") from error
    name = config.architectures[0]
    kind = getattr(transformers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ModelError(f"{Path(directory) / CONFIG}: transformers has no model '{name:.80}'")
    return kind, config


@contextmanager
def _no_bars() -> Iterator[None]:
    """Within: transformers draws no progress, which in a log is control characters."""
    logging = _transformers().utils.logging
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            "a directory with a model of transformers needs that package: "
            "pip install 'rankfold[hf]'"
        ) from error
    return transformers


def _tokenizer(directory: Pathlike) -> Any:
    if not any(_tokenizer_files(Path(directory))):
        raise CalibrationError(f"{directory} has no tokenizer")
    try:
        return _transformers().AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise CalibrationError(
            f"the tokenizer of {directory} cannot be read: {_first_line(error)}"
        ) from error


def _tokenizer_files(source: Path) -> Iterator[Path]:
    """Those that are in the directory; links count in a hub's cache alone, to files of its own.

    What is here is copied: a link must not bring another file of the user's along.
    """
    place = source.resolve()
    home = place.parents[1] if place.parent.name == "snapshots" else place
    for file in sorted(source.iterdir()):
        named = file.suffix in _TOKENIZER_SUFFIXES and file.name not in _NO_TOKENIZER
        named = named and not file.name.endswith(".index.json")
        if named and file.is_file() and file.resolve().is_relative_to(home):
            yield file


@contextmanager
def _default_dtype(dtype: Any) -> Iterator[None]:
    """Within: the dtype of new parameters; None: as it is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype if isinstance(dtype, torch.dtype) else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

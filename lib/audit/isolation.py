"""Confinement of a process to named files and without network, by Linux Landlock (https://docs.kernel.org/userspace-api/landlock.html).

It restricts the calling thread and every thread and process that it starts from then on, and cannot be undone.
"""

import ctypes
import os
import socket
import struct
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.errors import UserError
from lib.params import PARAMS_FILE

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls, the same on all architectures but alpha
VERSION_FLAG, PATH_BENEATH, SET_NO_NEW_PRIVS = 1, 1, 38  # of CREATE_RULESET, of ADD_RULE, of prctl
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
READ, OF_FILES = EXECUTE | READ_FILE | READ_DIR, EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
TCP = 0b11  # binding and connecting
ABI_WITH_TCP = 4

SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/proc", "/sys", "/dev", "/opt", "/run", "/var")
SEARCH_PATHS = ("PATH", "LD_LIBRARY_PATH")
CACHES = (".cache/torch", ".triton", ".nv")  # of compilers, below the home folder
CACHE_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")

Findings = dict[str, dict[str, object]]


def unchecked(why: str) -> Findings:
    """What `confine` returns where nothing was confined."""
    return {"training_data": {"passed": None, "why": why}, "network": {"passed": None, "why": why}}


def confine(*, read: Iterable[Path], write: Iterable[Path], forbidden: Iterable[Path], network: bool = False) -> Findings:
    """Leave this process only what it needs, then try what it must not do.

    What can be read besides `read`: the interpreter, its packages, the code in ``lib`` and ``stages``, the system's folders, caches of
    compilers, which are made if need be, and the temporary folder. Of the folder that the process runs in, and of the one that the code
    is in, nothing else can be; where these are below a folder that can, what lies beside them can. Connections that exist stay.

    Args:
        read: files and folders of the project.
        write: folders of the project; they are made if need be.
        forbidden: files that must not be readable afterwards; those that exist are tried.
        network: whether TCP is left alone, for processes that open connections later.

    Returns:
        The checks ``training_data`` and ``network``: whether they ``passed``, None where they could not be made, and numbers or ``why``.
    """
    if sys.platform != "linux":
        return unchecked("only Linux can confine a process")
    forbidden = [path for path in forbidden if path.exists()]
    try:
        abi = _restrict(list(read), list(write), network)
    except OSError as error:
        return unchecked(f"Landlock cannot be used here: {error.strerror}")
    return {"training_data": _try_files(forbidden), "network": _try_network(abi, network)}


def withhold_validation(stage: str, seed: int) -> None:
    """Take the validation text from this process for good, where the kernel can, and leave it the inputs of training and quantization.

    Args:
        stage: the stage that this process runs; it writes into its own folder only.
        seed: seed of the run, which names the folders.

    Raises:
        UserError: the text can be read all the same.
    """
    tokens = [TOKENIZE_FOLDER / name for name in ("tokenizer.model", "train", "heldout")]
    read = [PARAMS_FILE, Path("lib"), Path("stages"), *tokens, stage_folder("train", seed), stage_folder("calibrate", seed)]
    shards = sorted((TOKENIZE_FOLDER / "val").glob("*.bin"))
    tried = confine(read=read, write=[stage_folder(stage, seed)], forbidden=shards, network=True)["training_data"]
    if tried["passed"] is False:
        raise UserError(f"{TOKENIZE_FOLDER / 'val'}: expected that {stage} cannot read it, but of {len(shards)} files only "
                        f"{tried['files_refused']} were refused; move the project out of the folders of the system and of Python")


def _try_files(forbidden: Sequence[Path]) -> dict[str, object]:
    if not forbidden:
        return {"passed": None, "why": "there are no files on this machine that could be tried"}
    refused = sum(map(_is_refused, forbidden))
    return {"passed": refused == len(forbidden), "files_tried": len(forbidden), "files_refused": refused}


def _try_network(abi: int, network: bool) -> dict[str, object]:
    if network:
        return {"passed": None, "why": "the processes of several GPUs open connections while they work"}
    if abi < ABI_WITH_TCP:
        return {"passed": None, "why": f"version {abi} of Landlock cannot deny TCP, version {ABI_WITH_TCP} can"}
    refused = _connection_is_refused()
    return {"passed": refused, "connections_tried": 1, "connections_refused": int(refused)}


def _restrict(read: Sequence[Path], write: Sequence[Path], network: bool) -> int:
    """Make and enforce the rules; the version of Landlock's interface."""
    abi = _call(CREATE_RULESET, None, 0, VERSION_FLAG)
    rights = (1 << min(12 + abi, 15)) - 1  # version 1 has 13; 2 adds moving files between folders, 3 truncating them
    handled = struct.pack("=Q", rights) if abi < ABI_WITH_TCP else struct.pack("=QQ", rights, 0 if network else TCP)
    for folder in write:
        folder.mkdir(parents=True, exist_ok=True)
    code, hidden = _code_folder(), _hidden_folders()
    readable = {code / "lib", code / "stages", code / "tools", *read, *_links(read), *_outside(_system_folders(), hidden)}
    writable = {*write, temporary_folder(), *_outside(_scratch_folders(), hidden)}
    ruleset = _call(CREATE_RULESET, handled, len(handled), 0)
    try:
        for paths, allowed in ((readable, READ), (writable, rights)):
            for path in paths:
                _allow(ruleset, path, allowed & rights)
        _check(LIBC.prctl(SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))))
        _call(RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return abi


def _system_folders() -> list[Path]:
    searched = [folder for name in SEARCH_PATHS for folder in os.environ.get(name, "").split(os.pathsep)]
    return [Path(folder) for folder in (*SYSTEM, sys.prefix, sys.base_prefix, *sys.path, *searched) if folder]


def _scratch_folders() -> list[Path]:
    """Devices, and the caches of compilers, which are made: what does not exist cannot be allowed, and a compiler would fail later."""
    home = Path(os.environ.get("HOME", "/"))
    caches = [*(home / cache for cache in CACHES), *(Path(os.environ[name]) for name in CACHE_VARIABLES if os.environ.get(name))]
    for cache in caches:
        with suppress(OSError):  # a home that cannot be written has no caches
            cache.mkdir(parents=True, exist_ok=True)
    return [Path("/dev"), Path("/proc"), *caches]


def _code_folder() -> Path:
    return Path(__file__).resolve().parents[2]


def _hidden_folders() -> set[Path]:
    code = _code_folder()
    return {Path.cwd()} | ({code} if (code / "dvc.yaml").exists() else set())


def temporary_folder() -> Path:
    """The temporary folder of a confined process; where a hidden folder is below the usual one, another, which is used from then on."""
    folder = Path(tempfile.gettempdir()).resolve()
    if any(other.is_relative_to(folder) for other in _hidden_folders()):
        folder /= f"albatross-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    return folder


def _outside(folders: Iterable[Path], hidden: set[Path]) -> list[Path]:
    """The folders that exist; instead of one above a hidden folder what is in it apart from that, instead of a hidden one nothing."""
    found: list[Path] = []
    for folder in (folder.resolve() for folder in folders):
        if folder in hidden or not folder.exists():
            continue
        if any(other.is_relative_to(folder) for other in hidden):
            children = folder.iterdir() if os.access(folder, os.R_OK) else ()
            found += _outside((child for child in children if not child.is_symlink()), hidden)
        else:
            found.append(folder)
    return found


def _links(paths: Iterable[Path]) -> list[Path]:
    """What links among the files of some folders point to: DVC can be told to link files from its cache."""
    return [file.resolve() for path in paths for file in (path, *path.rglob("*")) if file.is_symlink()]


def _allow(ruleset: int, path: Path, allowed: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return  # what is not there, or cannot be reached, needs no permission
    try:
        rule = struct.pack("=Qi", allowed if path.is_dir() else allowed & OF_FILES, descriptor)
        _call(ADD_RULE, ruleset, PATH_BENEATH, rule, 0)
    finally:
        os.close(descriptor)


def _is_refused(path: Path) -> bool:
    try:
        path.open("rb").close()
    except PermissionError:
        return True
    return False


def _connection_is_refused() -> bool:
    with socket.socket() as connection:
        try:
            connection.connect(("127.0.0.1", 9))  # nothing listens there as a rule, which is another error
        except PermissionError:
            return True
        except OSError:
            return False
    return False


LIBC = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: int | bytes | None) -> int:
    converted = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    return _check(LIBC.syscall(ctypes.c_long(number), *converted))


def _check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

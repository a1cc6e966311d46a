# SPDX-License-Identifier: MIT
"""Boots Debian's cloud kernel in QEMU, with programs of this machine and a script, in memory.

The kernel comes from Debian's package, which is unpacked and not installed. Its first file system is
an archive in the "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst), which
contains busybox, the wanted programs with their libraries, and the script that runs as process 1.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import vhdx

CACHE = Path(__file__).parents[2] / ".kernel"
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
_PACKAGE = "linux-image-cloud-amd64"

_UNUSED = {"test", "idlelib", "site-packages", "dist-packages", "lib2to3", "tkinter", "ensurepip"}

_HEAD = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /run /bin /sbin /usr/bin /usr/sbin
/bin/busybox --install -s /bin
export PATH=/usr/bin:/usr/sbin:/bin:/sbin HOME=/tmp
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp; mount -t tmpfs run /run
echo 3 > /proc/sys/kernel/printk
echo /usr/sbin/modprobe > /proc/sys/kernel/modprobe
modprobe() { /usr/sbin/modprobe "$@"; }
for each in virtio_pci virtio_blk virtio_net; do modprobe $each; done
ifconfig lo 127.0.0.1 up
ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
say() { echo "GUEST: $*"; }
check() { if "$@"; then :; else say "FAILED ($?): $*"; sync; poweroff -f; fi; }
"""
_TAIL = """
say finished
sync
poweroff -f
"""


def program(name: str) -> Path | None:
    """The path of a program of this machine, or None."""
    found = shutil.which(name, path=PATH)
    return None if found is None else Path(found)


def kernel() -> tuple[Path, Path, str] | None:
    """The kernel, the directory with lib/modules, and its version; None without Debian's package."""
    found = sorted(CACHE.glob("boot/vmlinuz-*"))
    if not found:
        if not _fetch():
            return None
        found = sorted(CACHE.glob("boot/vmlinuz-*"))
    return found[-1], CACHE, found[-1].name.removeprefix("vmlinuz-")


def _fetch() -> bool:
    """Unpacks the package that the metapackage depends on; returns whether it could."""
    depends = subprocess.run(
        ["apt-cache", "depends", _PACKAGE], capture_output=True, text=True, check=False
    ).stdout
    name = re.search(r"linux-image-\S+-cloud-amd64", depends)
    if name is None or program("dpkg-deb") is None:
        return False
    new = CACHE.with_name(f"{CACHE.name}.{os.getpid()}")
    new.mkdir()
    try:
        done = subprocess.run(["apt-get", "download", name[0]], cwd=new, capture_output=True)
        packages = list(new.glob("*.deb"))
        if done.returncode != 0 or not packages:
            return False
        subprocess.run(["dpkg-deb", "-x", packages[0], new], check=True)
        packages[0].unlink()
        version = next(new.glob("boot/vmlinuz-*")).name.removeprefix("vmlinuz-")
        subprocess.run([program("depmod") or "depmod", "-b", new, version], check=True)
        try:
            new.rename(CACHE)
        except OSError:
            return CACHE.is_dir()  # another test was faster
        return True
    finally:
        shutil.rmtree(new, ignore_errors=True)


class Files:
    """The files of the guest: paths there, and where they come from here."""

    def __init__(self) -> None:
        self._found: dict[str, Path | bytes] = {}
        busybox = program("busybox")
        assert busybox is not None
        self.add(busybox, "/bin/busybox")

    def add(self, source: Path, target: str | None = None) -> None:
        """A file, with the libraries that it needs."""
        name = target or os.fspath(source)
        if name in self._found:
            return
        self._found[name] = source.resolve()
        linked = subprocess.run(["ldd", source], capture_output=True, text=True, check=False).stdout
        for library in re.findall(r"(/\S+) \(0x", linked):
            self._found.setdefault(library, Path(library).resolve())

    def programs(self, *names: str) -> None:
        """Programs of this machine, in /usr/sbin whatever directory they are in here."""
        for name in names:
            found = program(name)
            assert found is not None, name
            self.add(found, f"/usr/sbin/{name}")

    def modules(self, version: str, *names: str) -> None:
        """Modules of the kernel, with the modules that they need."""
        base = CACHE / "lib/modules" / version
        for name in names:
            text = subprocess.run(
                [program("modprobe"), "-S", version, "-d", CACHE, "--show-depends", name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for path in re.findall(r"^insmod (\S+)", text, re.MULTILINE):
                inside = Path(path).resolve().relative_to(CACHE.resolve())
                self._found[f"/{inside}"] = Path(path)
        for index in base.glob("modules.*"):
            self._found[f"/lib/modules/{version}/{index.name}"] = index

    def python(self) -> None:
        """The interpreter, its library, vhdx and what that needs; started as /usr/bin/vhdx."""
        library = Path(os.__file__).parent
        for path in library.rglob("*.py"):
            inside = path.relative_to(library).parts
            if inside[0] not in _UNUSED and "__pycache__" not in inside:
                self.add(path)
        for path in (library / "lib-dynload").glob("*.so"):
            self.add(path)
        for each in _distributions("vhdx"):
            for path in each.files or ():
                found = Path(str(path.locate()))
                if found.is_file() and not {"tests", "__pycache__"} & set(path.parts):
                    self.add(found)
        for path in Path(vhdx.__file__).parent.rglob("*"):  # it may be an editable install
            if path.suffix in {".py", ".so"}:
                self.add(path)
        for path in Path(sys.prefix).glob("pyvenv.cfg"):
            self.add(path)
            home = Path(path.read_text().partition("home = ")[2].partition("\n")[0])
            self.add(Path(sys.executable).resolve(), os.fspath(home / Path(sys.executable).name))
        self.add(Path(sys.executable).resolve(), sys.executable)
        parent = Path(vhdx.__file__).parents[1]
        start = f'export PYTHONPATH={parent}\nexec {sys.executable} -P -m vhdx.cli "$@"'
        self.text("/usr/bin/vhdx", f"#!/bin/sh\n{start}\n")

    def text(self, target: str, content: str) -> None:
        """A script."""
        self._found[target] = content.encode()

    def archive(self, path: Path) -> None:
        """Writes all of it as an archive."""
        with path.open("wb") as out:
            made: set[str] = set()
            for number, (name, source) in enumerate(sorted(self._found.items()), 1):
                parts = name.strip("/").split("/")
                for depth in range(1, len(parts)):
                    directory = "/".join(parts[:depth])
                    if directory not in made:
                        made.add(directory)
                        _put(out, directory, stat.S_IFDIR | 0o755, b"", 100000 + len(made))
                data = source if isinstance(source, bytes) else source.read_bytes()
                _put(out, name.strip("/"), stat.S_IFREG | 0o755, data, number)
            _put(out, "TRAILER!!!", 0, b"", 0)


def _distributions(name: str, seen: set[str] | None = None) -> list[metadata.Distribution]:
    """A distribution and all that it requires."""
    seen = set() if seen is None else seen
    if name in seen:
        return []
    seen.add(name)
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return []  # for another version of Python, or an extra
    required = [re.match(r"[\w.-]+", each) for each in found.requires or () if "extra ==" not in each]
    return [found, *(d for each in required if each for d in _distributions(each[0], seen))]


def _put(out, name: str, mode: int, data: bytes, inode: int) -> None:
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % each for each in fields) + name.encode() + b"\0"
    out.write(head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4))


def boot(
    directory: Path, files: Files, script: str, *options: str, memory: int = 1024
) -> subprocess.Popen[bytes]:
    """Starts the guest; its console is the standard output of QEMU.

    Args:
        directory: for the archive.
        files: what is in it.
        script: shell commands; ``check COMMAND`` ends the guest if the command fails, and ``say``
            writes a line that begins with "GUEST: ".
        options: of QEMU.
        memory: of the guest, MiB.
    """
    found = kernel()
    assert found is not None
    files.text("/init", _HEAD + script + _TAIL)
    archive = directory / "guest.cpio"
    files.archive(archive)
    return subprocess.Popen(
        [
            program("qemu-system-x86_64"),
            *("-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", str(memory)),
            *("-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"),
            *("-kernel", found[0], "-initrd", archive),
            *("-append", "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on"),
            *("-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n"),
            *options,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run(directory: Path, files: Files, script: str, *options: str, seconds: float = 300) -> str:
    """Runs the guest to its end; returns what it wrote.

    Raises:
        AssertionError: a ``check`` failed, or the script did not come to its end.
    """
    guest = boot(directory, files, script, *options)
    try:
        text = guest.communicate(timeout=seconds)[0].decode(errors="replace")
    except subprocess.TimeoutExpired as error:
        guest.kill()
        text = guest.communicate()[0].decode(errors="replace")
        raise AssertionError(f"the guest hangs:\n{text}") from error
    if "GUEST: finished" not in text:
        raise AssertionError(f"the guest failed:\n{text}")
    return text

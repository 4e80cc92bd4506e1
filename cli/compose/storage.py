"""What a service reads and writes: mounts, secrets and configs; from their one form to specs."""

from __future__ import annotations

import posixpath

from msgspec.structs import replace

from cli.compose.around import (
    PROCESS,
    Surroundings,
    lookup,
    strings_of,
)
from cli.compose.at import At
from cli.compose.problems import listed
from swarm.v1 import (
    BindOptions,
    ConfigReference,
    CredentialSpec,
    FileTarget,
    Mount,
    SecretReference,
    TmpfsOption,
    TmpfsOptions,
    VolumeOptions,
)

MOUNT_TYPES = ("volume", "bind", "tmpfs", "image")
_PROCESS_MOUNTS = ("volume", "bind", "tmpfs")
_OF_WINDOWS = "a path of Windows, and nodes run Linux"


def mounts(at: At, around: Surroundings) -> tuple[Mount, ...]:
    found: list[Mount] = []
    targets: dict[str, str] = {}
    volumes, tmpfs = at.set_at("volumes"), at.set_at("tmpfs")
    for each in volumes.elements() if volumes is not None else ():
        mount = _mount(each, around)
        if mount is not None:
            found.append(mount)
            _target_once(each, mount.target, targets)
    for each in tmpfs.elements() if tmpfs is not None and tmpfs.is_list() else ():
        mount = _tmpfs(each)
        found.append(mount)
        _target_once(each, mount.target, targets)
    runtime = at.set_at("runtime")
    if runtime is not None and runtime.node.value == PROCESS:
        for mount in found:
            if mount.type not in _PROCESS_MOUNTS:
                at.fail_key(
                    "volumes",
                    f"a mount of type {mount.type} needs the docker runtime",
                    f"write {listed(_PROCESS_MOUNTS)}",
                )
    return tuple(found)


def _target_once(at: At, target: str, targets: dict[str, str]) -> None:
    place = target.rstrip("/")
    if place and place in targets:
        at.fail(f"something is mounted at {place} already", "remove one of the two")
    targets[place] = target


def _mount(at: At, around: Surroundings) -> Mount | None:
    kind_at, source_at, target_at = at.set_at("type"), at.set_at("source"), at.set_at("target")
    assert kind_at is not None
    if kind_at.node.value == "cluster":
        kind_at.fail(
            "cluster volumes (CSI) are not offered", "use type: volume with a driver of your own"
        )
        return None
    if kind_at.node.value == "npipe":
        kind_at.fail("named pipes exist on Windows only, and nodes run Linux", "use type: bind")
        return None
    kind = kind_at.choice(MOUNT_TYPES)
    source = source_at.text() if source_at is not None else ""
    target = target_at.text() if target_at is not None else ""
    if not target:
        at.lacks("target", "add target: and the path inside the container")
    elif _is_windows(target):
        (target_at or at).fail(f'"{target}" is {_OF_WINDOWS}', "write /PATH")
    elif not target.startswith("/"):
        (target_at or at).fail(
            f'the target "{target}" is not an absolute path',
            f"write {posixpath.normpath(f'/{target}')}" if target.strip("./ ") else "write /PATH",
        )
    elif not target.strip("/"):
        (target_at or at).fail("the container's root itself cannot be mounted over", "write /PATH")
    readonly, consistency = at.set_at("read_only"), at.set_at("consistency")
    for other in ("bind", "volume", "tmpfs", "image"):
        if other != kind and kind and at.set_at(other) is not None:
            at.fail_key(other, f'"{other}" does not go with type: {kind}', f"write it as {kind}:")
    mount = Mount(
        type=kind,
        source=source,
        target=target,
        read_only=readonly.truth() if readonly is not None else False,
        consistency=consistency.choice(("default", "consistent", "cached", "delegated"))
        if consistency is not None
        else "",
    )
    if kind == "tmpfs" and source:
        at.fail_key("source", "a tmpfs has no source", "remove source")
    if kind in ("bind", "image") and not source:
        at.fail(f"a mount of type {kind} needs a source", "add source:")
    if kind == "bind" and _is_windows(source):
        (source_at or at).fail(f'"{source}" is {_OF_WINDOWS}', "write /PATH")
    if kind == "volume" and source.startswith(("/", ".", "~")):
        (source_at or at).fail(
            f'"{source}" is a path, and a volume has a name', "write type: bind for a host path"
        )
        return replace(mount, source="")
    if kind == "volume":
        return _volume(mount, at, around)
    if kind == "tmpfs":
        return replace(mount, source="", tmpfs_options=_tmpfs_options(at.set_at("tmpfs")))
    options = _bind_options(at.set_at("bind")) if kind == "bind" else None
    return replace(mount, bind_options=options)


def _is_windows(path: str) -> bool:
    return path.startswith("\\\\") or (path[1:2] == ":" and path[2:3] in ("\\", "/"))


def _bind_options(at: At | None) -> BindOptions | None:
    if at is None:
        return None
    propagation, create = at.set_at("propagation"), at.set_at("create_host_path")
    recursive, selinux = at.set_at("recursive"), at.set_at("selinux")
    how = recursive.choice(("enabled", "disabled", "writable", "readonly")) if recursive else ""
    return BindOptions(
        propagation=propagation.choice(
            ("rprivate", "private", "rshared", "shared", "rslave", "slave")
        )
        if propagation is not None
        else "",
        create_mountpoint=create.truth() if create is not None else False,
        non_recursive=how == "disabled",
        read_only_non_recursive=how == "writable",
        read_only_force_recursive=how == "readonly",
        selinux=selinux.choice(("z", "Z")) if selinux is not None else "",
    )


def _volume(mount: Mount, at: At, around: Surroundings) -> Mount:
    options = at.set_at("volume")
    no_copy = options.set_at("nocopy") if options is not None else None
    subpath = options.set_at("subpath") if options is not None else None
    own = VolumeOptions(
        no_copy=no_copy.truth() if no_copy is not None else False,
        subpath=subpath.text() if subpath is not None else "",
        labels=strings_of(options, "labels") if options is not None else {},
    )
    given = own if own != VolumeOptions() else None
    if not mount.source:
        return replace(mount, volume_options=given)
    declared = lookup("volume", mount.source, at, around.volumes)
    if declared is None or declared.external:
        source = declared.full_name if declared is not None else mount.source
        return replace(mount, source=source, volume_options=given)
    labels = {**own.labels, **declared.labels}
    return replace(
        mount,
        source=declared.full_name,
        volume_options=VolumeOptions(
            no_copy=own.no_copy,
            subpath=own.subpath,
            labels=dict(sorted(labels.items())),
            driver_config=declared.driver,
        ),
    )


def _tmpfs_options(at: At | None) -> TmpfsOptions | None:
    if at is None:
        return None
    size, mode = at.set_at("size"), at.set_at("mode")
    return TmpfsOptions(
        size_bytes=size.size() if size is not None else 0,
        mode=mode.mode_bits() if mode is not None else 0,
    )


def _tmpfs(at: At) -> Mount:
    """TARGET[:size=64m,mode=1777,FLAG...]"""
    text = at.text(empty=False)
    target, colon, rest = text.partition(":")
    if text and not target.startswith("/"):
        at.fail(f'"{target}" is not an absolute path', "write /PATH or /PATH:size=64m,mode=1777")
    size = mode = 0
    readonly = False
    options: list[TmpfsOption] = []
    for option in rest.split(",") if colon else ():
        name, equals, value = option.partition("=")
        part = At(at.node.made(value), at.path, at.report)
        if name == "size":
            size = part.size()
        elif name == "mode":
            mode = part.mode_bits()
        elif name in ("ro", "rw"):
            readonly = name == "ro"
        elif name in ("uid", "gid", "nr_inodes", "nr_blocks") and equals:
            options.append(TmpfsOption(words=(name, value)))
        elif name in ("exec", "noexec", "nosuid", "suid", "nodev", "dev"):
            options.append(TmpfsOption(words=(name,)))
        else:
            at.fail(
                f'the option "{option}" is not known',
                "known are size=, mode=, uid=, gid=, nr_inodes=, ro, rw, exec, noexec, nosuid and "
                "nodev",
            )
    given = TmpfsOptions(size_bytes=size, mode=mode, options=tuple(options))
    return Mount(
        type="tmpfs",
        target=target,
        read_only=readonly,
        tmpfs_options=given if given != TmpfsOptions() else None,
    )


def _file(at: At, source: str) -> FileTarget:
    target, mode = at.set_at("target"), at.set_at("mode")
    uid, gid = at.set_at("uid"), at.set_at("gid")
    if target is not None and ".." in target.text().split("/"):
        target.fail("a target holds no ..", "write the path itself")
    for owner in (uid, gid):
        if owner is not None and not (text := owner.text()).isdecimal() and "{{" not in text:
            owner.fail(f'"{text}" is not a number', "write the number of the user or group")
    return FileTarget(
        name=(target.text() if target is not None else "") or source,
        uid=uid.text() if uid is not None else "0",
        gid=gid.text() if gid is not None else "0",
        mode=mode.mode_bits() if mode is not None else 0o444,
    )


def _files_once(at: At, file: FileTarget, folder: str, files: dict[str, str]) -> None:
    """Reports two secrets or configs in one place."""
    path = file.name if file.name.startswith("/") else f"{folder}/{file.name}"
    if path in files:
        at.fail(f"{files[path]} stands at {path} already", "give one of them another target")
    files.setdefault(path, f'"{file.name}"')


def secrets(at: At, around: Surroundings) -> tuple[SecretReference, ...]:
    found = at.set_at("secrets")
    references = []
    files: dict[str, str] = {}
    for each in found.elements() if found is not None else ():
        source = each.set_at("source")
        name = source.text() if source is not None else ""
        declared = lookup("secret", name, source or each, around.secrets)
        if declared is not None:
            file = _file(each, name)
            _files_once(each, file, "/run/secrets", files)
            references.append(SecretReference(secret_name=declared.full_name, file=file))
    return tuple(sorted(references, key=lambda each: each.secret_name))


def configs(
    at: At, around: Surroundings
) -> tuple[tuple[ConfigReference, ...], CredentialSpec | None]:
    found = at.set_at("configs")
    references = []
    files: dict[str, str] = {}
    for each in found.elements() if found is not None else ():
        source = each.set_at("source")
        name = source.text() if source is not None else ""
        declared = lookup("config", name, source or each, around.configs)
        if declared is not None:
            file = _file(each, name)
            _files_once(each, file, "", files)
            references.append(ConfigReference(config_name=declared.full_name, file=file))
    spec_at = at.set_at("credential_spec")
    credential = None
    if spec_at is not None and spec_at.is_map("file: NAME.json"):
        values = {key: each.text() for key, each in spec_at.items()}
        if len(values) != 1:
            spec_at.fail("exactly one of config, file and registry is needed", "keep one")
        if name := values.get("config", ""):
            declared = lookup("config", name, spec_at, around.configs)
            if declared is not None:
                references.append(ConfigReference(config_name=declared.full_name, runtime=True))
                values["config"] = declared.full_name
        credential = CredentialSpec(
            config=values.get("config", ""),
            file=values.get("file", ""),
            registry=values.get("registry", ""),
        )
    references.sort(key=lambda each: each.config_name)
    return tuple(references), credential

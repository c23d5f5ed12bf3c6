"""`vmctl image`: build, list and show guest images."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.files import write_private
from host_agent.hypervisors.images import MANIFEST, find_image, image_store, list_images, verify_image


def add_parser(subparsers: Any) -> None:
    """Add `image` and its subcommands; each sets `func`, which takes the parsed options and returns a status."""
    parser = subparsers.add_parser("image", help="build, list and show guest images")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    build = actions.add_parser("build", help="build a guest image from a recipe")
    build.add_argument("--recipe", default="debian-minimal", help="name of a recipe, or path of a .toml file")
    build.add_argument("--output", type=Path, help="directory of images (default: the image store)")
    build.add_argument("--name", default="", help="name of the image (default: the recipe's)")
    build.add_argument("--cache", type=Path, help="directory for layers that later builds use again")
    build.add_argument("--refresh", action="store_true", help="fetch Debian anew, with its updates of today")
    build.add_argument(
        "--from-oci", type=Path, metavar="FILE", help="from a container: OCI archive or `docker save` file"
    )
    build.add_argument("--add-package", action="append", default=[], metavar="P", help="one more package; repeat")
    build.add_argument("--copy", action="append", default=[], metavar="F:/PLACE", help="a file for the guest; repeat")
    build.add_argument(
        "--format",
        choices=["qcow2", "vdi", "vmdk", "ova"],
        default="qcow2",
        help="qcow2 (with kernel and initrd, for QEMU) or a disk for VirtualBox and others",
    )
    build.set_defaults(func=_build)

    agent = actions.add_parser("agent", help="write the guest agent as one file, for machines that others made")
    agent.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: vmwrapper-guest-agent.pyz or .tar.gz"
    )
    agent.add_argument("--frozen", action="store_true", help="with a Python of its own, as a .tar.gz")
    agent.add_argument("--python", default="3.10", help="oldest Python it is for: 3.10 (and all newer ones) or 3.9")
    agent.add_argument(
        "--byte-code", action="append", default=[], metavar="PYTHON", help="program of a Python to compile for; repeat"
    )
    agent.add_argument("--cache", type=Path, help="directory for layers that later builds use again")
    agent.set_defaults(func=_agent)

    context = actions.add_parser("context", help="write a drive that installs the agent in a machine that others made")
    context.add_argument("-o", "--output", type=Path, default=Path("context.iso"), metavar="FILE")
    context.add_argument("--agent", type=Path, required=True, help="what `vmctl image agent` wrote")
    context.add_argument("--config", type=Path, help="settings of this very machine, for its agent")
    context.add_argument("--instance", default="vmwrapper", help="cloud-init installs anew when this has changed")
    context.set_defaults(func=_context)

    listing = actions.add_parser("list", help="images on this host")
    listing.set_defaults(func=_list)

    pack = actions.add_parser("pack", help="write an image as one file to be sent, or its difference from another")
    pack.add_argument("image", help="name of an image, or path of its directory")
    pack.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    pack.add_argument("--since", default="", metavar="IMAGE", help="an image that the receiver has")
    pack.set_defaults(func=_pack)

    install = actions.add_parser("install", help="install what `vmctl image pack` wrote")
    install.add_argument("package", type=Path)
    install.add_argument("--name", default="", help="name of the image here (default: its own)")
    install.set_defaults(func=_install)

    verify = actions.add_parser("verify", help="read an image's files and compare them with its manifest")
    verify.add_argument("image", help="name of an image, or path of its directory")
    verify.set_defaults(func=_verify)

    show = actions.add_parser("show", help="what an image is made of")
    show.add_argument("image", help="name of an image, or path of its directory")
    show.set_defaults(func=_show)


def _build(options: argparse.Namespace) -> int:
    from vm_images.builder import build_from_container, build_image
    from vm_images.cache import Cache, default_cache
    from vm_images.recipe import extended, load_recipe

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    cache = Cache(options.cache or default_cache())
    if options.from_oci is not None:
        name = options.name or options.from_oci.name.partition(".")[0]
        base = load_recipe(options.recipe)
        image = build_from_container(
            options.from_oci, base, options.output or image_store(), cache, name=name, progress=progress
        )
        print(image.directory)
        return 0
    recipe = extended(load_recipe(options.recipe), options.add_package, options.copy)
    image = build_image(
        recipe,
        options.output or image_store(),
        cache,
        name=options.name or (recipe.name if options.format == "qcow2" else f"{recipe.name}-{options.format}"),
        form=options.format,
        refresh=options.refresh,
        progress=progress,
    )
    print(image.directory)
    return 0


def _agent(options: argparse.Namespace) -> int:
    from vm_images.agent_file import make_agent_file
    from vm_images.cache import Cache, default_cache

    cache = Cache(options.cache or default_cache())
    if options.frozen:
        from vm_images.builder import frozen_agent
        from vm_images.frozen import write_frozen

        print(write_frozen(options.output or Path("vmwrapper-guest-agent.tar.gz"), frozen_agent(cache)))
        return 0
    output = options.output or Path("vmwrapper-guest-agent.pyz")
    print(make_agent_file(output, cache, python=options.python, compilers=options.byte_code))
    return 0


def _context(options: argparse.Namespace) -> int:
    from vm_images.context import context_iso

    try:
        config = options.config.read_bytes() if options.config is not None else None
    except OSError as error:
        raise ConfigError(f"the settings {options.config} cannot be read: {error.strerror}") from None
    write_private(options.output, context_iso(options.agent, config, options.instance))
    print(options.output)
    return 0


def _list(options: argparse.Namespace) -> int:
    images = list_images()
    if not images:
        print(f"no images in {image_store()}; build one with: vmctl image build", file=sys.stderr)
    for image in images:
        size = sum(p.stat().st_size for p in (image.disk, image.kernel, image.initrd) if p is not None)
        print(
            f"{image.name:24} {image.architecture:8} {image.memory_mb:5} MB RAM "
            f"{size / 1e6:7.0f} MB  {image.digest[:12]}  {image.directory}"
        )
    return 0


def _pack(options: argparse.Namespace) -> int:
    from vm_images.package import digest_of_package, pack_image

    base = find_image(options.since) if options.since else None
    package = pack_image(find_image(options.image), options.output, base)
    print(f"{package}: {package.stat().st_size / 1e6:.1f} MB, SHA-256 {digest_of_package(package)}")
    return 0


def _install(options: argparse.Namespace) -> int:
    from vm_images.package import install_package

    print(install_package(options.package, image_store(), options.name).directory)
    return 0


def _verify(options: argparse.Namespace) -> int:
    image = find_image(options.image)
    names = verify_image(image)
    print(f"{image.name}: {', '.join(names)} are as the manifest says")
    return 0


def _show(options: argparse.Namespace) -> int:
    image = find_image(options.image)
    manifest: dict[str, Any] = json.loads((image.directory / MANIFEST).read_text("utf-8"))
    packages = manifest.pop("packages", {})
    print(json.dumps({"directory": str(image.directory), **manifest}, indent=2))
    for name, version in packages.items():
        print(f"{name} {version}")
    return 0

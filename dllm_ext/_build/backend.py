"""PEP 517 backend: setuptools, which asks for torch, cmake and ninja only where the target environment lacks them."""

import shutil

import target
from setuptools import build_meta

prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
build_editable = build_meta.build_editable
build_sdist = build_meta.build_sdist


def get_requires_for_build_wheel(config_settings=None):
    return target.build_requirements()


def get_requires_for_build_editable(config_settings=None):
    return target.build_requirements()


def get_requires_for_build_sdist(config_settings=None):
    return []


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    # setuptools' own build folder: a file that has since been removed from the package would still be in it.
    shutil.rmtree("build/wheel", ignore_errors=True)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)

# SPDX-License-Identifier: Apache-2.0
"""Measurements on a GPU: run as ``python -m benchmarks.NAME``. Not installed with the package."""

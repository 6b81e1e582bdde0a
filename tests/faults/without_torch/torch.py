# SPDX-License-Identifier: Apache-2.0
"""Stands for torch where it is not needed: importing that takes most of the time of a process."""

raise ModuleNotFoundError("No module named 'torch'", name="torch")

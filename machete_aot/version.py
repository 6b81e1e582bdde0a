# SPDX-License-Identifier: Apache-2.0
"""The version of the package and of the bundle that it embeds."""

__version__ = "0.1.0"

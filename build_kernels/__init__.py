# SPDX-License-Identifier: Apache-2.0
"""The build pipeline: catalogue -> .cu -> PTX -> cubin -> checks -> bundle. Run it as ``python -m build_kernels``."""

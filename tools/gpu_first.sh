#!/usr/bin/env bash
# The first half hour on a GPU, as one command: see CONTRIBUTING.md. PYTHON names the interpreter that holds torch.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_first" "$@"

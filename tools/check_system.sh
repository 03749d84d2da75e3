#!/bin/sh
# Names what the system lacks, with its Debian package, before anything is installed. Usage: check_system.sh [PYTHON]
python=${1:-python3}
missing=""
need() { missing="$missing
  - $1   (Debian: apt-get install $2)"; }

if ! command -v "$python" >/dev/null 2>&1; then
    need "Python 3.11 or newer as '$python'" "python3"
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    need "Python 3.11 or newer ('$python' is $("$python" -V 2>&1)); or name another: make PYTHON=python3.12 ..." "python3.11"
else
    "$python" -c 'import ensurepip, venv' 2>/dev/null || need "Python's venv module" "python3-venv"
    header=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"] + "/Python.h")')
    [ -f "$header" ] || need "the Python headers (Python.h)" "python3-dev"
fi
command -v "${CXX:-g++}" >/dev/null 2>&1 || need "a C++ compiler (deepspeed compiles a small extension)" "g++"

if [ -n "$missing" ]; then
    printf 'MegaXELM cannot be installed yet. Missing:%s\n' "$missing" >&2
    exit 2
fi

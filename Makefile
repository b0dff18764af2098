# All targets except compose-test need only Python >= 3.11 and make; the first use installs the rest into .venv.
PYTHON ?= python3
BIN := .venv/bin

CLANG ?= clang

# Most tests wait for processes most of the time; tests of one file share them, and stay together.
TESTS_AT_A_TIME ?= 2

# Real SGLang on CPUs, for interop: 3 GB, kept.
SGLVENV ?= $(HOME)/.cache/dp-extproc/sglang-venv
SGLRUN ?= $(HOME)/.cache/dp-extproc/sglang-run

# Kubernetes' own API server, etcd and helm, for kubernetes-run.
KUBE_BIN ?= $(HOME)/.cache/dp-extproc/kubernetes/bin

# The control planes of Envoy Gateway and Istio, for envoy-gateway-run and istio-run.
MESH_BIN ?= $(HOME)/.cache/dp-extproc/mesh/bin

# Official client libraries, for clients: 800 MB, kept.
CLIENTS ?= $(HOME)/.cache/dp-extproc/clients

# Envoys by version, for envoy-versions: 150 MB each, kept.
ENVOYS ?= $(HOME)/.cache/dp-extproc/envoys

.PHONY: setup test quickstart-test compose-test check format manifests demo faults soak interop clients kubernetes-run envoy-versions \
  envoy-gateway-run istio-run bench balance simulated autoscaling stream-end clean

setup: .venv/ready

.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[demo]" --group dev
	touch $@

# Style, types and tests: what a change has to pass.
test: check
	$(BIN)/pytest --numprocesses $(TESTS_AT_A_TIME) --dist loadfile

# The quick start of the README, word for word, in a new environment; skipped if pip reaches no package index.
quickstart-test: setup
	$(BIN)/pytest tests/quickstart.py

# docker compose up, its profiles, failures and its end, in real containers. Needs Docker, or root and Debian's docker.io
# and mmdebstrap. If an image cannot be pulled, a stand-in is built from Debian's packages.
compose-test: setup
	$(BIN)/pytest --durations 8 tests/compose/first_contact.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@find src/dp_extproc -name lab -prune -o -name '*.py' -print0 | xargs -0 cat | wc -l | sed 's/^ */lines of the product: /'

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What is made from the configuration and from the Helm chart: the schema of its values, and the plain manifests. Needs
# helm, which interop/kubernetes/build.sh helm builds with Go.
manifests: setup
	$(BIN)/python deploy/helm/config_schema.py
	deploy/manifests/render.sh

# Both placements on a fleet of stand-in engines: make demo ARGS="--time-scale 6", or KEEP=1 to leave it running
demo: setup
	$(BIN)/dp-extproc demo $(if $(KEEP),--keep) $(ARGS)

# Every kind of fault on every part, and what clients get: prints the table of docs/reliability.md, and updates the page.
faults: setup
	PYTHONPATH=tests $(BIN)/python -m faults.table docs/reliability.md

# Hours under load while engines and worker processes are killed: make soak ARGS="--seconds 3600"
soak: .venv/bench-ready
	$(BIN)/python -m bench.soak $(ARGS)

# Envoy and the service in front of real SGLang engines, which it installs first: 4 minutes, and then about 10.
interop: setup
	SGLVENV=$(SGLVENV) SGLRUN=$(SGLRUN) interop/setup.sh
	PYTHONPATH=tests $(BIN)/python -m interop --venv $(SGLVENV) --run $(SGLRUN) $(ARGS)

# Official clients of OpenAI's and Anthropic's APIs, which it installs first, run into mistakes and errors: 5 minutes. It
# updates the table of docs/clients.md. One client: make clients ARGS="--only litellm". It needs Node and npm.
clients: setup
	CLIENTS=$(CLIENTS) interop/clients/setup.sh
	PYTHONPATH=tests $(BIN)/python -m interop.clients --clients $(CLIENTS) $(ARGS)

# Discovery against Kubernetes' own API server, which interop/kubernetes/build.sh builds: 4 minutes. It needs openssl,
# unshare and ip.
kubernetes-run: setup
	PYTHONPATH=tests $(BIN)/python -m interop.kubernetes --programs $(KUBE_BIN) $(ARGS)

# The scenarios through Envoy Gateway, which interop/mesh/build.sh envoy-gateway builds: 5 minutes. It needs openssl,
# unshare and ip. Envoys of other versions: ARGS="--envoy PATH --envoy PATH".
envoy-gateway-run: setup
	PYTHONPATH=tests $(BIN)/python -m interop.envoy_gateway --programs $(MESH_BIN) $(ARGS)

# The end-to-end scenarios through gateways that Istio configures. MESH_BIN has the programs of interop/mesh/build.sh and
# of interop/kubernetes/build.sh: 4 minutes. It needs openssl, unshare and ip. With an InferencePool alone, half a minute:
# ARGS="--way inference-pool".
istio-run: setup
	PYTHONPATH=tests $(BIN)/python -m interop.istio --programs $(MESH_BIN) $(ARGS)

# Every printed form and the end-to-end tests on each supported version of Envoy: 10 minutes for each, one after the
# other. One version, and no tests: make envoy-versions ARGS="1.36.4 --no-tests"
envoy-versions: setup
	PYTHONPATH=tests $(BIN)/python -m interop.envoy_versions --envoys $(ENVOYS) $(ARGS)

# What a request costs in the service, against an empty ext_proc server.
bench: setup
	$(BIN)/python bench/ext_proc_cost.py

# Scheduling end to end, against the engines' own placement and against smg: make balance ARGS="--topology 2p2d4 --trace agent"
balance: .venv/bench-ready
	$(BIN)/python -m bench.balance $(ARGS)

# Every simulation of docs/scheduling.md, its tables and plots.
simulated: .venv/bench-ready
	bench/simulated.sh

# What HPA makes of several signals on a load ramp, as in docs/autoscaling.md: some minutes.
autoscaling: setup
	$(BIN)/python -m bench.autoscaling $(ARGS)

# The filter that ends truncated streams, after a change of it. Needs clang with lld (Debian: clang, lld).
stream-end: src/dp_extproc/envoy_config/stream_end.wasm

src/dp_extproc/envoy_config/stream_end.wasm: src/dp_extproc/envoy_config/stream_end.c
	$(CLANG) --target=wasm32 -Oz -nostdlib -Wall -Wextra -Werror -Wl,--no-entry -Wl,-z,stack-size=8192 \
	  -Wl,--strip-all -o $@ $<

.venv/bench-ready: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --group bench
	touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache

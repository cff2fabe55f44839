#!/usr/bin/env bash
# A cluster whose nodes are processes of this machine, for trying out what runs over several nodes.
#
#   clusters/local.sh start [NODES]   two nodes if not said; prints where to submit jobs
#   clusters/local.sh stop            ends exactly the nodes that it started
#
# FOLDER (where it keeps its state), PORT, DASHBOARD (port; those after it are the nodes') and CPUS (of each node) may
# be set in the environment.
set -euo pipefail

FOLDER=${FOLDER:-/tmp/manta-cluster}
PORT=${PORT:-6390}
DASHBOARD=${DASHBOARD:-8266}
CPUS=${CPUS:-1}
HERE=127.0.0.1

node() { # name, arguments of ray start
	local name=$1 number=${1##*-}
	shift
	# setsid: a group of its own, so that stopping it reaches its children and nobody else's.
	# A port of its own for each agent: without one, the node takes no jobs.
	setsid ray start --block --num-cpus "$CPUS" --node-name "$name" --object-store-memory 100000000 \
		--disable-usage-stats --dashboard-agent-listen-port $((DASHBOARD + number)) "$@" >"$FOLDER/$name.log" 2>&1 &
	echo $! >"$FOLDER/$name.pid"
}

alive() { # number of nodes that answer
	ray status --address "$HERE:$PORT" 2>/dev/null | grep -c '^ *1 node_' || true
}

start() {
	local nodes=${1:-2} n
	if compgen -G "$FOLDER/*.pid" >/dev/null; then
		echo "a cluster is kept in $FOLDER already; clusters/local.sh stop ends it" >&2
		exit 1
	fi
	mkdir -p "$FOLDER"
	# Ray asks for a token where it finds one; one that is there is shared by all nodes and by those who submit.
	if [ "${RAY_AUTH_MODE:-token}" = token ] && [ -z "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ]; then
		ray get-auth-token --generate >/dev/null
	fi
	node node-1 --head --port "$PORT" --dashboard-host $HERE --dashboard-port "$DASHBOARD" \
		--ray-client-server-port $((DASHBOARD + 100)) --temp-dir "$FOLDER/ray"
	for _ in $(seq 120); do
		[ "$(alive)" -ge 1 ] && break
		sleep 0.5
	done
	# A folder of its own for each node, as on machines of their own: in a shared one, a node that no longer needs a
	# job's uploaded files would delete them under the others.
	for n in $(seq 2 "$nodes"); do node "node-$n" --address "$HERE:$PORT" --temp-dir "$FOLDER/ray-$n"; done
	for _ in $(seq 120); do
		if [ "$(alive)" -ge "$nodes" ]; then
			echo "$nodes nodes; submit with: ray job submit --address http://$HERE:$DASHBOARD --working-dir . -- python jobs/train.py FILE"
			return
		fi
		sleep 0.5
	done
	echo "$(alive) of $nodes nodes came up; their words are in $FOLDER/*.log" >&2
	stop
	exit 1
}

lives() { # does the group have a process that is not a zombie
	ps -eo pgid=,stat= | awk -v group="$1" '$1 == group && $2 !~ /^Z/ { found = 1 } END { exit !found }'
}

stop() {
	local file group signal
	for signal in TERM KILL; do
		for file in "$FOLDER"/*.pid; do
			[ -e "$file" ] && kill -$signal -- "-$(cat "$file")" 2>/dev/null || true
		done
		for file in "$FOLDER"/*.pid; do
			[ -e "$file" ] || continue
			group=$(cat "$file")
			for _ in $(seq 40); do
				lives "$group" || break
				sleep 0.25
			done
			lives "$group" || rm -f "$file"
		done
	done
}

case ${1:-} in
start) start "${2:-2}" ;;
stop) stop ;;
*)
	sed -n '2,8s/^# \{0,1\}//p' "$0"
	exit 2
	;;
esac

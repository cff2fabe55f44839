#!/usr/bin/env bash
# The chart on one machine: Kubernetes by kind, KubeRay's operator, the chart with values-small.yaml, and its test.
#
#   clusters/kind.sh start KUBERAY   KUBERAY: the chart kuberay-operator 1.7, as a folder, an archive or a URL
#   clusters/kind.sh stop
#
# Needs docker, kind, kubectl and helm. NOT RUN SO FAR: there was no machine with them. helm/README.md says what was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CLUSTER=${CLUSTER:-manta}
IMAGE=manta:$(sed -n 's/^appVersion: *//p' helm/orchestrator/Chart.yaml)-cpu

start() {
	local operator=$1
	docker build --target cpu --tag "$IMAGE" .
	kind create cluster --name "$CLUSTER" --wait 120s
	kind load docker-image "$IMAGE" --name "$CLUSTER"
	local kube=(--kube-context "kind-$CLUSTER")
	helm install kuberay-operator "$operator" "${kube[@]}" --wait
	helm install manta helm/orchestrator "${kube[@]}" --values helm/orchestrator/values-small.yaml
	kubectl --context "kind-$CLUSTER" wait --for=condition=Ready pod \
		--selector ray.io/cluster=manta,ray.io/node-type=head --timeout=600s
	kubectl --context "kind-$CLUSTER" wait --for=condition=Ready rayservice/manta-endpoint --timeout=900s
	helm test manta "${kube[@]}" --logs --timeout 10m
}

case ${1:-} in
start) start "${2:?the chart kuberay-operator: a folder, an archive or a URL}" ;;
stop) kind delete cluster --name "$CLUSTER" ;;
*)
	sed -n '2,8s/^# \{0,1\}//p' "$0"
	exit 2
	;;
esac

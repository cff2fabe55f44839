{{/* What the schema cannot say: values that do not go together. Each message begins with the path of a value. */}}
{{- define "manta.checks" -}}
{{- $values := .Values -}}
{{- if and $values.mlflow.enabled $values.tracking.url -}}
{{- fail "tracking.url: set, while mlflow.enabled is true; set mlflow.enabled=false to use the server at the URL" -}}
{{- end -}}
{{- if not (or $values.mlflow.enabled $values.tracking.url) -}}
{{- fail "tracking.url: needed where mlflow.enabled is false" -}}
{{- end -}}
{{- if and (gt (int $values.mlflow.replicas) 1) (not $values.mlflow.backend.existingSecret) -}}
{{- fail "mlflow.backend.existingSecret: needed where mlflow.replicas is above 1; sqlite is for one server" -}}
{{- end -}}
{{- if and (gt (int $values.mlflow.replicas) 1) (not $values.mlflow.artifacts.destination) -}}
{{- fail "mlflow.artifacts.destination: needed where mlflow.replicas is above 1; the claim is for one server" -}}
{{- end -}}
{{- include "manta.checkGroups" (list "cluster" $values.cluster $values.autoscaler.enabled) -}}
{{- include "manta.checkGroups" (list "endpoint" $values.endpoint $values.autoscaler.enabled) -}}
{{- include "manta.checkStorage" . -}}
{{- $endpoint := $values.endpoint -}}
{{- if gt (int $endpoint.replicas.min) (int $endpoint.replicas.max) -}}
{{- fail (printf "endpoint.replicas.min: %d is above endpoint.replicas.max, %d" (int $endpoint.replicas.min) (int $endpoint.replicas.max)) -}}
{{- end -}}
{{- if and $endpoint.enabled (not $endpoint.head.schedulable) (not $endpoint.workerGroups) -}}
{{- fail "endpoint.workerGroups: empty, and endpoint.head.schedulable is false, so nothing could serve" -}}
{{- end -}}
{{- if and (or $values.cluster.enabled $values.train.enabled $values.search.enabled) (not $values.cluster.head.schedulable) (not $values.cluster.workerGroups) -}}
{{- fail "cluster.workerGroups: empty, and cluster.head.schedulable is false, so nothing could run" -}}
{{- end -}}
{{- if and $values.ingress.enabled (not $endpoint.enabled) -}}
{{- fail "ingress.enabled: needs endpoint.enabled" -}}
{{- end -}}
{{- if gt (int $endpoint.drainSeconds) (int $values.pods.terminationGracePeriodSeconds) -}}
{{- fail (printf "pods.terminationGracePeriodSeconds: %d is below endpoint.drainSeconds, %d; answers would be cut off" (int $values.pods.terminationGracePeriodSeconds) (int $endpoint.drainSeconds)) -}}
{{- end -}}
{{- range list "train" "search" -}}
{{- $job := get $values . -}}
{{- if and $job.enabled (not $job.run) -}}
{{- fail (printf "%s.run: needed where %s.enabled is true; --set-file %s.run=FILE takes a run file" . . .) -}}
{{- end -}}
{{- end -}}
{{- if and $values.train.enabled (gt (len (printf "%s-train" (include "manta.fullname" .))) 47) -}}
{{- fail "fullnameOverride: too long; a RayJob's name may have 47 characters" -}}
{{- end -}}
{{- end -}}

{{/* Worker groups: (list path section autoscaling). */}}
{{- define "manta.checkGroups" -}}
{{- $path := index . 0 -}}{{- $auto := index . 2 -}}
{{- $seen := dict -}}
{{- range $index, $group := (index . 1).workerGroups -}}
{{- if hasKey $seen $group.name -}}
{{- fail (printf "%s.workerGroups.%d.name: %q is given twice" $path $index $group.name) -}}
{{- end -}}
{{- $_ := set $seen $group.name true -}}
{{- $most := int (default $group.replicas $group.maxReplicas) -}}
{{- $least := int (default 0 $group.minReplicas) -}}
{{- if and $auto (or (lt (int $group.replicas) $least) (gt (int $group.replicas) $most)) -}}
{{- fail (printf "%s.workerGroups.%d.replicas: %d is not between minReplicas, %d, and maxReplicas, %d" $path $index (int $group.replicas) $least $most) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* A run's checkpoints have to be reachable from every node. */}}
{{- define "manta.checkStorage" -}}
{{- $values := .Values -}}{{- $storage := $values.storage -}}
{{- $users := add (ternary 1 0 $values.cluster.enabled) (ternary 1 0 $values.train.enabled) (ternary 1 0 $values.search.enabled) -}}
{{- if and (gt (int $users) 0) (or $values.cluster.workerGroups (gt (int $users) 1)) -}}
{{- if not $storage.enabled -}}
{{- fail "storage.enabled: needed as soon as there are cluster.workerGroups, or jobs beside the cluster; every node writes to it" -}}
{{- end -}}
{{- if not (or $storage.existingClaim $storage.oneNode (has "ReadWriteMany" $storage.accessModes)) -}}
{{- fail "storage.accessModes: ReadWriteMany is needed as soon as there are cluster.workerGroups, or jobs beside the cluster; set storage.oneNode=true if Kubernetes has one node only" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The spec of a Ray cluster: the same for RayCluster, RayService, RayJob and RayCronJob. */}}

{{/* dict: root, component, nodes (head and workerGroups), shared (is the storage mounted), run (ConfigMap or ""). */}}
{{- define "manta.raySpec" -}}
{{- $root := .root -}}{{- $values := $root.Values -}}
{{- $auto := and $values.autoscaler.enabled (gt (len .nodes.workerGroups) 0) -}}
rayVersion: {{ $values.ray.version | quote }}
authOptions:
  mode: {{ $values.auth.mode }}
  {{- if and (eq $values.auth.mode "token") $values.auth.existingSecret }}
  secretName: {{ $values.auth.existingSecret }}
  {{- end }}
{{- if $values.tls.enabled }}
tlsOptions:
  enabled: true
{{- end }}
{{- include "manta.gcs" . }}
enableInTreeAutoscaling: {{ $auto }}
{{- if $auto }}
autoscalerOptions:
  version: v2
  idleTimeoutSeconds: {{ $values.autoscaler.idleTimeoutSeconds }}
  upscalingMode: {{ $values.autoscaler.upscalingMode }}
  imagePullPolicy: {{ $values.image.pullPolicy }}
  securityContext:
    {{- include "manta.containerSecurity" (list $root false) | nindent 4 }}
  resources:
    {{- toYaml $values.autoscaler.resources | nindent 4 }}
{{- end }}
headServiceAnnotations:
  {{- toYaml (merge (dict "manta/component" .component) $values.commonAnnotations) | nindent 2 }}
headGroupSpec:
  rayStartParams:
    dashboard-host: "0.0.0.0"
    {{- if not .nodes.head.schedulable }}
    num-cpus: "0"
    {{- end }}
  template:
    {{- include "manta.rayPod" (merge (dict "group" .nodes.head "node" "head" "auto" $auto) .) | nindent 4 }}
{{- with .nodes.workerGroups }}
workerGroupSpecs:
  {{- range . }}
  - groupName: {{ .name }}
    replicas: {{ .replicas }}
    minReplicas: {{ if $auto }}{{ default 0 .minReplicas }}{{ else }}{{ .replicas }}{{ end }}
    maxReplicas: {{ if $auto }}{{ default .replicas .maxReplicas }}{{ else }}{{ .replicas }}{{ end }}
    {{- with .idleTimeoutSeconds }}
    idleTimeoutSeconds: {{ . }}
    {{- end }}
    rayStartParams:
      {{- toYaml (default (dict) .rayStartParams) | nindent 6 }}
    template:
      {{- include "manta.rayPod" (merge (dict "group" . "node" "worker" "auto" $auto) $) | nindent 6 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Fault tolerance of the head. Each cluster keeps its state under its own name. */}}
{{- define "manta.gcs" -}}
{{- $gcs := .root.Values.gcs -}}
{{- if eq $gcs.backend "redis" }}
gcsFaultToleranceOptions:
  backend: redis
  redisAddress: {{ required "gcs.redis.address: needed where gcs.backend is redis" $gcs.redis.address | quote }}
  {{- with $gcs.redis.existingSecret }}
  redisPassword:
    valueFrom:
      secretKeyRef:
        name: {{ . }}
        key: {{ $gcs.redis.passwordKey }}
  {{- end }}
{{- else if eq $gcs.backend "rocksdb" }}
gcsFaultToleranceOptions:
  backend: rocksdb
  storage:
    size: {{ $gcs.storage.size }}
    {{- with $gcs.storage.storageClass }}
    storageClassName: {{ . }}
    {{- end }}
    deletionPolicy: {{ $gcs.storage.deletionPolicy }}
{{- end }}
{{- end -}}

{{/* Pod of a Ray node: the keys of manta.raySpec and group, node ("head" | "worker"), auto. */}}
{{- define "manta.rayPod" -}}
{{- $root := .root -}}{{- $values := $root.Values -}}
{{- $gpu := hasKey (default (dict) .group.resources.limits) "nvidia.com/gpu" -}}
{{- $image := default (include "manta.image" (list $root (ternary "cuda" "cpu" $gpu))) .group.image -}}
metadata:
  {{- include "manta.podMetadata" (list $root .component (default (dict) .group.labels) (default (dict) .group.annotations)) | nindent 2 }}
spec:
  serviceAccountName: {{ include "manta.serviceAccount" (list $root .node) }}
  # Only the autoscaler, beside the head, speaks to Kubernetes.
  automountServiceAccountToken: {{ and .auto (eq .node "head") }}
  enableServiceLinks: false # a Service called mlflow would set MLFLOW_PORT
  {{- if .auto }}
  restartPolicy: Never # autoscaler v2 counts a restarted container as the node that it has lost
  {{- end }}
  terminationGracePeriodSeconds: {{ $values.pods.terminationGracePeriodSeconds }}
  securityContext:
    {{- include "manta.podSecurity" $root | nindent 4 }}
  {{- include "manta.placement" (list $root .group) | nindent 2 }}
  {{- if and $values.preflight.enabled (eq .node "head") }}
  initContainers:
    - name: preflight
      image: {{ $image }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      # Says what is wrong in one line each: no tracking server, no room, other versions than the tested ones.
      command: [sh, -c, "for i in $(seq {{ $values.preflight.tries }}); do manta doctor && exit 0; sleep 10; done; exit 1"]
      env:
        {{- include "manta.rayEnv" (list $root .auto) | nindent 8 }}
      {{- with include "manta.rayEnvFrom" $root | trim }}
      envFrom:
        {{- . | nindent 8 }}
      {{- end }}
      securityContext:
        {{- include "manta.containerSecurity" (list $root false) | nindent 8 }}
      resources:
        {{- toYaml $values.preflight.resources | nindent 8 }}
      volumeMounts:
        {{- include "manta.rayMounts" . | nindent 8 }}
  {{- end }}
  containers:
    - name: ray-{{ .node }}
      image: {{ $image }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      {{- if eq .node "head" }}
      ports:
        - {name: gcs, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        - {name: metrics, containerPort: 8080}
        - {name: serve, containerPort: 8000}
      {{- else }}
      ports:
        - {name: metrics, containerPort: 8080}
        - {name: serve, containerPort: 8000}
      {{- end }}
      env:
        {{- include "manta.rayEnv" (list $root .auto) | nindent 8 }}
      {{- with include "manta.rayEnvFrom" $root | trim }}
      envFrom:
        {{- . | nindent 8 }}
      {{- end }}
      securityContext:
        {{- include "manta.containerSecurity" (list $root false) | nindent 8 }}
      resources:
        {{- toYaml .group.resources | nindent 8 }}
      {{- with $values.pods.livenessProbe }}
      livenessProbe:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $values.pods.readinessProbe }}
      readinessProbe:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      volumeMounts:
        {{- include "manta.rayMounts" . | nindent 8 }}
  volumes:
    - name: ray-logs
      emptyDir: {}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ .group.shm }}
    - name: manta
      {{- if and .shared $values.storage.enabled }}
      persistentVolumeClaim:
        claimName: {{ include "manta.storageClaim" $root }}
      {{- else }}
      emptyDir: {}
      {{- end }}
    - name: models
      {{- if $values.modelCache.enabled }}
      persistentVolumeClaim:
        claimName: {{ include "manta.modelClaim" $root }}
        {{- if and $values.modelCache.readOnly (eq .component "endpoint") }}
        readOnly: true
        {{- end }}
      {{- else }}
      emptyDir: {}
      {{- end }}
    {{- with .run }}
    - name: run
      configMap:
        name: {{ . }}
    {{- end }}
{{- end -}}

{{- define "manta.rayMounts" -}}
- {name: ray-logs, mountPath: /tmp/ray}
- {name: shm, mountPath: /dev/shm}
- {name: manta, mountPath: /mnt/manta}
- {name: models, mountPath: /mnt/models}
{{- if .run }}
- {name: run, mountPath: /etc/manta, readOnly: true}
{{- end }}
{{- end -}}

{{/* What every pod and every container has. */}}

{{/* Pod Security Standard "restricted", for a pod. */}}
{{- define "manta.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.pods.runAsUser }}
runAsGroup: {{ .Values.pods.runAsUser }}
fsGroup: {{ .Values.pods.runAsUser }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* The same, for a container: (list root readOnlyRootFilesystem). */}}
{{- define "manta.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
privileged: false
readOnlyRootFilesystem: {{ index . 1 }}
runAsNonRoot: true
runAsUser: {{ (index . 0).Values.pods.runAsUser }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Where a pod may run: (list root own), where own has nodeSelector, tolerations, affinity, ... of its group. */}}
{{- define "manta.placement" -}}
{{- $pods := (index . 0).Values.pods -}}{{- $own := index . 1 -}}
{{- with (index . 0).Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with merge (dict) (default (dict) $own.nodeSelector) $pods.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with concat (default (list) $own.tolerations) $pods.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with default $pods.affinity $own.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $own.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with default $pods.priorityClassName $own.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{/* Settings of the command and of MLflow's client. */}}
{{- define "manta.clientEnv" -}}
- name: MLFLOW_TRACKING_URI
  value: {{ include "manta.trackingUri" . | quote }}
{{- with .Values.attribution.owner }}
- name: LOGNAME # owner of what is tracked and registered, unless a run names one
  value: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* Secrets as environment: the tracking server's login for all, and what else is named. */}}
{{- define "manta.clientEnvFrom" -}}
{{- if and (not .Values.mlflow.enabled) .Values.tracking.existingSecret }}
- secretRef:
    name: {{ .Values.tracking.existingSecret }}
{{- end }}
{{- end -}}

{{/* Environment of a Ray node: (list root autoscaling). */}}
{{- define "manta.rayEnv" -}}
{{- $root := index . 0 -}}
{{ include "manta.clientEnv" $root }}
- name: MANTA_HOME
  value: /mnt/manta
- name: HF_HOME
  value: /mnt/models
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
# A container sees every core of its node; its share is the limit.
- name: OMP_NUM_THREADS
  valueFrom:
    resourceFieldRef:
      resource: limits.cpu
{{- if index . 1 }}
- name: MANTA_AUTOSCALING
  value: "1"
{{- end }}
{{- with $root.Values.huggingFace.endpoint }}
- name: HF_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- if $root.Values.huggingFace.offline }}
- name: HF_HUB_OFFLINE
  value: "1"
{{- end }}
{{- with $root.Values.huggingFace.existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $root.Values.huggingFace.key }}
{{- end }}
{{- with $root.Values.pods.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "manta.rayEnvFrom" -}}
{{ include "manta.clientEnvFrom" . }}
{{- range .Values.pods.secrets }}
- secretRef:
    name: {{ . }}
{{- end }}
{{- end -}}

{{/* A claim: (list root name component values). */}}
{{- define "manta.claim" -}}
{{- $root := index . 0 -}}{{- $claim := index . 3 -}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {{ index . 1 }}
  {{- $keep := ternary (dict "helm.sh/resource-policy" "keep") (dict) $claim.keep }}
  {{- include "manta.metadata" (list $root (index . 2) (dict) (merge $keep $claim.annotations)) | nindent 2 }}
spec:
  accessModes:
    {{- toYaml $claim.accessModes | nindent 4 }}
  {{- with $claim.storageClass }}
  storageClassName: {{ . }}
  {{- end }}
  resources:
    requests:
      storage: {{ $claim.size }}
{{- end -}}

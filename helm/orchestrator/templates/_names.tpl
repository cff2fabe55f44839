{{/* Names, labels, images: one definition each. */}}

{{/* KubeRay adds up to 25 characters to a name, and a label holds 63. */}}
{{- define "manta.fullname" -}}
{{- default .Release.Name .Values.fullnameOverride | trunc 36 | trimSuffix "-" -}}
{{- end -}}

{{- define "manta.clusterName" -}}{{ include "manta.fullname" . }}{{- end -}}
{{- define "manta.endpointName" -}}{{ include "manta.fullname" . }}-endpoint{{- end -}}
{{- define "manta.mlflowName" -}}{{ include "manta.fullname" . }}-mlflow{{- end -}}
{{- define "manta.storageClaim" -}}
{{- default (printf "%s-storage" (include "manta.fullname" .)) .Values.storage.existingClaim -}}
{{- end -}}
{{- define "manta.modelClaim" -}}
{{- default (printf "%s-models" (include "manta.fullname" .)) .Values.modelCache.existingClaim -}}
{{- end -}}
{{- define "manta.mlflowClaim" -}}
{{- default (include "manta.mlflowName" .) .Values.mlflow.persistence.existingClaim -}}
{{- end -}}

{{/* Service accounts: (list root "head" | "worker" | "mlflow" | "tools"). */}}
{{- define "manta.serviceAccount" -}}
{{- $root := index . 0 -}}{{- $role := index . 1 -}}
{{- if $root.Values.serviceAccount.create -}}
{{ include "manta.fullname" $root }}-{{ $role }}
{{- else -}}
{{ required "serviceAccount.name: needed where serviceAccount.create is false" $root.Values.serviceAccount.name }}
{{- end -}}
{{- end -}}

{{/* Labels that every object and every pod gets. Those of pods never hold a version: a change of them would roll a
     whole Ray cluster. */}}
{{- define "manta.sharedLabels" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: manta
{{- with .Values.attribution.owner }}
manta/owner: {{ . | quote }}
{{- end }}
{{- with .Values.attribution.team }}
manta/team: {{ . | quote }}
{{- end }}
{{- with .Values.attribution.costCenter }}
manta/cost-center: {{ . | quote }}
{{- end }}
{{- range $key, $value := .Values.commonLabels }}
{{ $key }}: {{ $value | quote }}
{{- end }}
{{- end -}}

{{/* Metadata of an object: (list root component extraLabels extraAnnotations). */}}
{{- define "manta.metadata" -}}
{{- $root := index . 0 -}}
namespace: {{ $root.Release.Namespace }}
labels:
  app.kubernetes.io/component: {{ index . 1 }}
  app.kubernetes.io/managed-by: {{ $root.Release.Service }}
  helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
  {{- include "manta.sharedLabels" $root | nindent 2 }}
  {{- if gt (len .) 2 }}
  {{- with index . 2 }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- end }}
{{- $extra := dict -}}
{{- if gt (len .) 3 }}{{ $extra = index . 3 }}{{ end }}
{{- with merge (dict) $extra $root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Metadata of a pod: (list root component extraLabels extraAnnotations). */}}
{{- define "manta.podMetadata" -}}
{{- $root := index . 0 -}}
labels:
  app.kubernetes.io/component: {{ index . 1 }}
  {{- include "manta.sharedLabels" $root | nindent 2 }}
  {{- with merge (dict) (index . 2) $root.Values.pods.labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with merge (dict) (index . 3) $root.Values.pods.annotations $root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* What a Service, a policy or a budget selects: (list root component). */}}
{{- define "manta.selector" -}}
app.kubernetes.io/component: {{ index . 1 }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
{{- end -}}

{{/* Queue of Kueue, on the objects that it admits. */}}
{{- define "manta.queueLabels" -}}
{{- with .Values.kueue.queue -}}
kueue.x-k8s.io/queue-name: {{ . | quote }}
{{- end -}}
{{- end -}}

{{/* (list root "cpu" | "cuda"). */}}
{{- define "manta.image" -}}
{{- $image := (index . 0).Values.image -}}
{{- $kind := get $image (index . 1) -}}
{{- $tag := default (printf "%s-%s" (index . 0).Chart.AppVersion (index . 1)) $kind.tag -}}
{{- if $kind.digest -}}
{{ $image.repository }}@{{ $kind.digest }}
{{- else -}}
{{ $image.repository }}:{{ $tag }}
{{- end -}}
{{- end -}}

{{- define "manta.trackingUri" -}}
{{- if .Values.mlflow.enabled -}}
http://{{ include "manta.mlflowName" . }}:{{ .Values.mlflow.port }}
{{- else -}}
{{ .Values.tracking.url }}
{{- end -}}
{{- end -}}

{{/* Where KubeRay keeps the token of the RayCluster. */}}
{{- define "manta.tokenSecret" -}}
{{- default (include "manta.clusterName" .) .Values.auth.existingSecret -}}
{{- end -}}

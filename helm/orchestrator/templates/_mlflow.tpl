{{/* Whether something of the bundled server is on the claim: its database, or the artifacts. */}}
{{- define "manta.mlflowOnClaim" -}}
{{- or (not .Values.mlflow.backend.existingSecret) (not .Values.mlflow.artifacts.destination) -}}
{{- end -}}

{{/* Names under which the server is asked; it refuses all others. */}}
{{- define "manta.mlflowHosts" -}}
{{- $name := include "manta.mlflowName" . -}}
{{- $names := list $name (printf "%s.%s" $name .Release.Namespace) (printf "%s.%s.svc" $name .Release.Namespace) (printf "%s.%s.svc.%s" $name .Release.Namespace .Values.clusterDomain) -}}
{{- $hosts := list "localhost:*" "127.0.0.1:*" -}}
{{- range $names }}{{ $hosts = append $hosts (printf "%s:%d" . (int $.Values.mlflow.port)) }}{{ end -}}
{{- join "," (concat $hosts .Values.mlflow.extraHosts) -}}
{{- end -}}

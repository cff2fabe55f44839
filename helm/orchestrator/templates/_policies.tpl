{{/* Pieces of policies and budgets. */}}

{{/* Ways out, where they are listed. */}}
{{- define "manta.egress" -}}
{{- with .Values.networkPolicy.egress }}
egress:
  - to: [{namespaceSelector: {}}] # names
    ports: [{protocol: UDP, port: 53}, {protocol: TCP, port: 53}]
  - to: [{podSelector: {}}] # this namespace
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* A budget: (list root name component least "head" | "worker" | ""). */}}
{{- define "manta.budget" -}}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "manta.fullname" (index . 0) }}-{{ index . 1 }}
  {{- include "manta.metadata" (list (index . 0) (index . 2)) | nindent 2 }}
spec:
  # A number, not a share: a Ray cluster does not tell Kubernetes how many pods it wants.
  minAvailable: {{ index . 3 }}
  selector:
    matchLabels:
      {{- include "manta.selector" (list (index . 0) (index . 2)) | nindent 6 }}
      {{- if ne (index . 2) "mlflow" }}
      ray.io/node-type: {{ index . 4 }}
      {{- end }}
{{- end -}}

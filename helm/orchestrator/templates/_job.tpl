{{/* A RayJob's spec: (list root component section command). */}}
{{- define "manta.jobSpec" -}}
{{- $root := index . 0 -}}{{- $component := index . 1 -}}{{- $job := index . 2 -}}
{{- $attribution := $root.Values.attribution -}}
{{- $words := list "manta" (index . 3) "/etc/manta/run.yaml" -}}
{{- with $attribution.owner }}{{ $words = append $words (printf "tracking.owner=%s" .) }}{{ end -}}
{{- with $attribution.team }}{{ $words = append $words (printf "tracking.tags.team=%s" .) }}{{ end -}}
{{- with $attribution.costCenter }}{{ $words = append $words (printf "tracking.tags.cost_center=%s" .) }}{{ end -}}
{{- range $job.overrides }}{{ $words = append $words (printf "'%s'" .) }}{{ end -}}
{{- with $root.Values.kueue.managedBy }}
managedBy: {{ . }}
{{ end -}}
entrypoint: {{ join " " $words | quote }}
submissionMode: K8sJobMode
backoffLimit: {{ $job.backoffLimit }}
shutdownAfterJobFinishes: true
ttlSecondsAfterFinished: {{ $job.ttlSeconds }}
{{- with $job.deadlineSeconds }}
activeDeadlineSeconds: {{ . }}
{{- end }}
submitterPodTemplate:
  metadata:
    {{- include "manta.podMetadata" (list $root $component (dict) (dict)) | nindent 4 }}
  spec:
    restartPolicy: Never
    serviceAccountName: {{ include "manta.serviceAccount" (list $root "tools") }}
    automountServiceAccountToken: false
    enableServiceLinks: false
    securityContext:
      {{- include "manta.podSecurity" $root | nindent 6 }}
    {{- include "manta.placement" (list $root (dict)) | nindent 4 }}
    containers:
      - name: ray-job-submitter # its command is KubeRay's
        image: {{ include "manta.image" (list $root "cpu") }}
        imagePullPolicy: {{ $root.Values.image.pullPolicy }}
        securityContext:
          {{- include "manta.containerSecurity" (list $root false) | nindent 10 }}
        resources:
          {{- toYaml $root.Values.tools.resources | nindent 10 }}
rayClusterSpec:
  {{- include "manta.raySpec" (dict "root" $root "component" $component "nodes" $root.Values.cluster "shared" true "run" (printf "%s-%s" (include "manta.fullname" $root) $component)) | nindent 2 }}
{{- end -}}
